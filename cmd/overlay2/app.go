//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	units "github.com/docker/go-units"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// app is one run of the command.
type app struct {
	ctx      context.Context
	in       io.Reader
	out, err io.Writer

	root        string
	json, quiet bool
	digests     bool // recorded of what is unpacked
	store       *store.Store
}

const rootVariable = "OVERLAY2_ROOT"

// command returns the command tree.
func (a *app) command() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "overlay2",
		Short: "keep container images as overlay2 layers: import, mount, diff, commit, export",
		Long: `overlay2 keeps container images as layers on disk and joins them with Linux overlayfs.

  overlay2 import busybox.tar --name busybox
  overlay2 create box --from busybox
  overlay2 mount box                 # prints the directory
  overlay2 changes box --tree
  overlay2 commit box --name mine
  overlay2 export mine --to mine.tar

Layers lie in ROOT/overlay2, in Docker's format; names and configs beside it.

Exit codes: 0 done; 1 failed, or check, repair or verify found something; 2 wrong usage; 3 not found;
4 exists already or is in use; 5 the image is damaged or cannot be read; 130 interrupted;
141 the reader of the output went away.`,
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version(),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(*cobra.Command, []string) (err error) {
			a.store, err = store.Open(a.root)
			return err
		},
	}
	root := os.Getenv(rootVariable)
	if root == "" {
		root = "/var/lib/overlay2"
	}
	cmd.SetOut(a.out)
	cmd.SetErr(a.err)
	cmd.SetIn(a.in)
	cmd.SetVersionTemplate("overlay2 {{.Version}}\n")
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	f := cmd.PersistentFlags()
	f.StringVar(&a.root, "root", root, "directory of layers and images ($"+rootVariable+")")
	f.BoolVar(&a.json, "json", false, "print one JSON document")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "no progress, no remarks")
	cmd.AddCommand(
		a.importCommand(), a.createCommand(), a.mountCommand(), a.umountCommand(), a.changesCommand(),
		a.diffCommand(), a.commitCommand(), a.lsCommand(), a.treeCommand(), a.rmCommand(), a.infoCommand(),
		a.checkCommand(), a.repairCommand(), a.verifyCommand(), a.exportCommand(), a.compareCommand(),
	)
	for _, c := range cmd.Commands() {
		if args := c.Args; args != nil {
			c.Args = func(cmd *cobra.Command, given []string) error {
				if err := args(cmd, given); err != nil {
					return usagef("%s: %w (try --help)", cmd.Name(), err)
				}
				return nil
			}
		}
	}
	cmd.Args = func(_ *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usagef("unknown command %q (try --help)", args[0])
		}
		return nil
	}
	return cmd
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// lock locks the store against other processes that change it.
func (a *app) lock() (io.Closer, error) {
	return a.store.Lock(a.ctx, func() { a.remark("waiting for another overlay2 to finish") })
}

// withDriver opens the driver, and closes it after f.
func (a *app) withDriver(f func(*overlay2.Driver) error) (err error) {
	log := logrus.New()
	log.SetOutput(a.err)
	if a.quiet {
		log.SetOutput(io.Discard)
	}
	d, err := overlay2.New(a.store.Home(), overlay2.Options{Log: logrus.NewEntry(log), RecordDigests: a.digests})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Cleanup()) }()
	return f(d)
}

// locked is withDriver under the store's lock.
func (a *app) locked(f func(*overlay2.Driver) error) (err error) {
	l, err := a.lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	return a.withDriver(f)
}

// existing is withDriver for commands that have nothing to do where no store is.
func (a *app) existing(f func(*overlay2.Driver) error) error {
	if !a.store.Exists() {
		return fmt.Errorf("%s %w: nothing has been imported or created", a.root, store.ErrNotFound)
	}
	return a.withDriver(f)
}

// remark tells something on the way, on standard error.
func (a *app) remark(format string, args ...any) {
	if !a.quiet {
		fmt.Fprintf(a.err, "overlay2: "+format+"\n", args...)
	}
}

// result prints the command's outcome: v as JSON, or what text writes.
func (a *app) result(v any, text func(io.Writer) error) error {
	if !a.json {
		return text(a.out)
	}
	e := json.NewEncoder(a.out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// line returns a text of one formatted line.
func line(format string, args ...any) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := fmt.Fprintf(w, format+"\n", args...)
		return err
	}
}

// isTerminal reports whether w is a terminal.
func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// printable returns a path as it is, or quoted if it could do something to a terminal
// or be taken for two.
func printable(s string) string {
	if utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) < 0 {
		return s
	}
	return strconv.Quote(s)
}

// short is an id for people.
func short(id string) string {
	if len(id) == 64 {
		return id[:12]
	}
	return id
}

func human(n int64) string { return units.BytesSize(float64(n)) }

// now is the time, or what SOURCE_DATE_EPOCH sets.
func now() time.Time {
	if s, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64); err == nil {
		return time.Unix(s, 0).UTC()
	}
	return time.Now().UTC().Truncate(time.Second)
}
