//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/bcc2decd/overlay2/internal/vmtest/spec"
)

// A power cut is a guest that is killed while TestGuestPower works in it: what its kernel had not written
// is lost, what it had is in the image files. The next guest, on the same images, is told what the
// one before had said that it had done, and looks.

const (
	cutTest = "TestGuestPower"
	// Lines that the test writes; see guestpower_linux_test.go.
	cutFound = "VMCUT found "
	cutLayer = "VMCUT layer "
	// cutLines bounds how many lines of layers a guest may write before it is killed.
	cutLines = 400
)

// cutSet is one home on one filesystem, and what is known of its layers.
type cutSet struct {
	fs, mode string
	layers   []string
	cuts     int
}

// cutter cuts power.
type cutter struct {
	m       *machine
	images  []string
	disks   []spec.Disk
	file    string // holds what is known of layers
	console []string
}

// runCuts cuts the power of a guest n times. If unsafe, nothing is synced in the guest, and a loss must be seen.
func runCuts(ctx context.Context, o options, g guest, _ io.Writer) (err error) {
	if !g.uml {
		return errors.New("only user-mode Linux is quick enough to be killed many times")
	}
	tmp, err := os.MkdirTemp("", "vmtest-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	g.disks = []string{"ext4", "xfs"}
	tests, guestInit, err := build(ctx, o.repo, "", tmp, g.arch, []string{"."})
	if err != nil {
		return err
	}
	c := &cutter{file: filepath.Join(tmp, "layers"), m: &machine{
		guest: g, dir: tmp, repo: o.repo, guestInit: guestInit, tests: tests,
		testArgs: []string{"-test.v", "-test.timeout=0", "-test.run=^" + cutTest + "$"}, silence: time.Duration(float64(silence) * o.slow),
	}}
	if c.images, c.disks, err = c.m.makeDisks(); err != nil {
		return err
	}
	modes := []string{"background", "strict"}
	if o.unsafe {
		modes = []string{"off"}
	}
	var sets []*cutSet
	for _, fs := range g.disks {
		for _, mode := range modes {
			sets = append(sets, &cutSet{fs: fs, mode: mode})
		}
	}
	// Once more for each home than it was cut, to look at what the last cut has left.
	for i := range o.cuts + len(sets) {
		set := sets[i%len(sets)]
		switch found, err := c.cut(ctx, set, i < o.cuts); {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && o.unsafe && failed(c.console): // not for want of a guest that boots
			c.showLoss()
			fmt.Printf("cut %d, %s: loss seen, as it must be: %v\n", i, set.fs, err)
			return nil
		case err != nil:
			fmt.Printf("---- the last of the console:\n%s----\n", strings.Join(c.console, ""))
			return fmt.Errorf("after %d cuts, %s/%s: %w", i, set.fs, set.mode, err)
		default:
			fmt.Printf("%4d %s/%s: %s\n", i, set.fs, set.mode, found)
		}
	}
	if o.unsafe {
		return errors.New("nothing is synced, and no loss was seen: the test proves nothing")
	}
	return nil
}

// showLoss shows what the test says of the first layers that are not as they must be.
func (c *cutter) showLoss() {
	shown := 0
	for _, line := range c.console {
		if strings.Contains(line, "_test.go:") && shown < 3 {
			fmt.Print(line)
			shown++
		}
	}
}

// cut starts a guest, has it look at what is left of its layers, and kills it while it makes new ones.
// Without work it is killed when it has looked.
func (c *cutter) cut(ctx context.Context, set *cutSet, work bool) (found string, err error) {
	if err := os.WriteFile(c.file, []byte(strings.Join(set.layers, "")), 0o644); err != nil {
		return "", err
	}
	config := spec.Config{HostFS: true, Disks: c.disks, Env: append(c.m.env(),
		"OVERLAY2_TEST_CUT_HOME=/mnt/"+set.fs+"/"+set.mode+"/home", "OVERLAY2_TEST_CUT_MODE="+set.mode,
		"OVERLAY2_TEST_CUT_LAYERS="+filepath.Join(spec.Host, c.file))}
	cmd, err := c.m.uml(config, c.images)
	if err != nil {
		return "", err
	}
	// As in machine.run: the guest must not outlive this program, which is its thread's parent.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if _, err := cmd.StdinPipe(); err != nil {
		return "", err
	}
	console, w, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer console.Close()
	cmd.Stdout, cmd.Stderr = w, w
	if err := errors.Join(cmd.Start(), w.Close()); err != nil {
		return "", err
	}
	kill := func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // it may have ended by itself
	stop := context.AfterFunc(ctx, kill)
	defer stop()
	quiet := time.AfterFunc(c.m.silence, kill)
	defer quiet.Stop()
	left := 0
	if work {
		left = 1 + rand.IntN(cutLines)
	}
	found, err = c.follow(console, set, left, func() { quiet.Reset(c.m.silence) }, kill)
	kill()
	var exit *exec.ExitError
	if err2 := cmd.Wait(); err2 != nil && !errors.As(err2, &exit) {
		err = errors.Join(err, err2)
	}
	set.cuts++
	return found, err
}

// follow reads a guest's console, calls kill after so many lines of layers, and reads what it said until then.
func (c *cutter) follow(console io.Reader, set *cutSet, left int, alive, kill func()) (found string, err error) {
	c.console = nil
	lines := bufio.NewReader(console)
	for {
		line, err := lines.ReadString('\n')
		whole := err == nil
		if line != "" {
			alive()
			if c.console = append(c.console, line); len(c.console) > consoleLines {
				c.console = c.console[1:]
			}
		}
		line = strings.TrimRight(line, "\r\n")
		switch layer, ok := strings.CutPrefix(line, cutLayer); {
		case strings.HasPrefix(line, cutFound) && whole:
			found = strings.TrimPrefix(line, cutFound)
			set.layers = nil // they are gone
			if left == 0 {
				kill()
			}
		case ok && whole:
			set.layers = append(set.layers, layer+"\n")
			if left--; left == 0 {
				kill()
			}
		}
		switch {
		case err == io.EOF && found == "":
			return "", errors.New("the guest did not say that what it found is right")
		case err == io.EOF && left > 0:
			return "", errors.New("the guest ended by itself")
		case err == io.EOF:
			return found, nil
		case err != nil:
			return "", err
		}
	}
}
