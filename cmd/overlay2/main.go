//go:build linux

// Command overlay2 keeps container images as overlay2 layers and works with them:
// imports, mounts, shows changes, commits and exports.
//
// Exit codes: 0 done, 1 failed (also: check has found problems, repair left some, verify a difference),
// 2 wrong usage, 3 no such image, layer or file, 4 the name is taken or the thing in use,
// 5 the image is damaged or of a kind that cannot be read, 130 interrupted, 141 the reader of the output went away.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"golang.org/x/sys/unix"
)

// Exit codes.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitImage       = 5
	exitInterrupted = 130
	exitPipe        = 141
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	// The first signal asks for a clean end. A second one ends the process as usual.
	context.AfterFunc(ctx, stop)
	// A reader that goes away is an error of the write, so that what is mounted and laid out is taken away again.
	signal.Ignore(unix.SIGPIPE)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run does one command and returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	a := &app{ctx: ctx, in: in, out: out, err: errOut}
	cmd := a.command()
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	code := exitCode(err)
	if !errors.Is(err, errSilent) && code != exitPipe {
		fmt.Fprintf(errOut, "overlay2: %v\n", err)
	}
	return code
}

// errSilent is a failure that the output has told already.
var errSilent = errors.New("failed")

// usageError is an error in the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func exitCode(err error) int {
	is := func(targets ...error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
	var usage usageError
	switch {
	case errors.As(err, &usage), is(store.ErrName):
		return exitUsage
	case is(context.Canceled):
		return exitInterrupted
	case is(unix.EPIPE):
		return exitPipe
	case is(image.ErrInvalid, image.ErrDigest, image.ErrMissing, image.ErrUnsupported, image.ErrPlatform):
		return exitImage
	case is(store.ErrExists, store.ErrInUse, overlay2.ErrLayerExists, overlay2.ErrLayerInUse, unix.EBUSY):
		return exitConflict
	case is(store.ErrNotFound, overlay2.ErrLayerNotFound, fs.ErrNotExist):
		return exitNotFound
	}
	return exitFailure
}
