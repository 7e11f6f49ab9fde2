//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/bcc2decd/overlay2/internal/vmtest/spec"
)

// silence is how long a guest may say nothing: tests are shorter, on a busy host too.
const silence = 6 * time.Minute

// consoleLines is how much of the console is shown when a guest dies.
const consoleLines = 150

// run starts the guest and follows its console until it ends, or kills it at the
// deadline. What it printed last is shown if it did not end as it should.
func (m *machine) run(ctx context.Context, verbose bool) (*report, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.guest.timeout, fmt.Errorf("not done after %v", m.guest.timeout))
	defer cancel()
	ctx, kill := context.WithCancelCause(ctx)
	defer kill(nil)
	cmd, err := m.command()
	if err != nil {
		return nil, err
	}
	// A guest must not outlive this program. The signal comes when the thread that
	// started it ends, so that must not.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// User-mode Linux consists of several processes: the group is what can be killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	// QEMU takes an end of its input for a console that was closed, and the guest's
	// next write waits for ever: keep a pipe open.
	if _, err := cmd.StdinPipe(); err != nil {
		return nil, err
	}
	console, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer console.Close()
	cmd.Stdout, cmd.Stderr = w, w
	if err := errors.Join(cmd.Start(), w.Close()); err != nil {
		return nil, err
	}
	quiet := time.AfterFunc(m.silence, func() { kill(fmt.Errorf("hangs: said nothing for %v", m.silence)) })
	defer quiet.Stop()
	stop := context.AfterFunc(ctx, func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // it may have ended by itself
	})
	defer stop()
	r := &report{guest: m.guest, verbose: verbose, out: m.out, alive: func() { quiet.Reset(m.silence) }}
	readErr := r.read(console)
	waitErr := cmd.Wait()
	if err := ctx.Err(); err != nil {
		readErr = context.Cause(ctx)
	} else if !r.ended && readErr == nil {
		readErr = fmt.Errorf("died: %w", errors.Join(waitErr, io.ErrUnexpectedEOF))
	}
	if readErr != nil {
		fmt.Fprintf(m.out, "---- the last of the console of %s:\n%s----\n", m.guest.name, strings.Join(r.console, ""))
	}
	return r, readErr
}

// report collects what a guest says.
type report struct {
	guest   guest
	verbose bool
	out     io.Writer

	kernel  string
	console []string // the last lines
	ended   bool
	runs    []result
	failed  bool

	alive func()   // called for every line
	test  []string // output of the test that is running
}

// result is how the tests of one package went.
type result struct {
	name            string
	code            int
	seconds         float64
	passed, skipped int
	done            bool
	skips           []string
}

// read follows the console to its end.
func (r *report) read(console io.Reader) error {
	lines := bufio.NewReader(console)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			if r.alive != nil {
				r.alive()
			}
			line = strings.TrimRight(line, "\r\n")
			if r.console = append(r.console, line+"\n"); len(r.console) > consoleLines {
				r.console = r.console[1:]
			}
			if err := r.line(line); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (r *report) line(line string) error {
	if rest, ok := strings.CutPrefix(line, spec.LineError); ok {
		return errors.New(rest)
	}
	switch {
	case line == spec.LineEnd:
		r.ended = true
	case strings.HasPrefix(line, spec.LineStart):
		return r.start(strings.TrimPrefix(line, spec.LineStart))
	case strings.HasPrefix(line, spec.LineRun):
		r.runs = append(r.runs, result{name: strings.TrimPrefix(line, spec.LineRun), code: -1})
	case strings.HasPrefix(line, spec.LineExit):
		return r.exit(strings.TrimPrefix(line, spec.LineExit))
	case len(r.runs) > 0:
		r.output(line)
	case r.verbose:
		fmt.Fprintln(r.out, line)
	}
	return nil
}

// start checks that the guest is what it should be.
func (r *report) start(line string) error {
	var page int
	if _, err := fmt.Sscan(line, &r.kernel, &page); err != nil {
		return fmt.Errorf("%q: %w", line, err)
	}
	fmt.Fprintf(r.out, "== %s: kernel %s, %s, pages of %d\n", r.guest.name, r.kernel, r.guest.arch, page)
	if r.guest.pageSize != 0 && page != r.guest.pageSize {
		return fmt.Errorf("the page size should be %d", r.guest.pageSize)
	}
	return nil
}

func (r *report) exit(line string) error {
	run := &r.runs[len(r.runs)-1]
	var name string
	if _, err := fmt.Sscan(line, &name, &run.code, &run.seconds); err != nil {
		return fmt.Errorf("%q: %w", line, err)
	}
	run.done = true
	verdict := "ok  "
	if run.code != 0 {
		verdict = "FAIL"
		r.failed = true
		r.show(r.test)
	}
	r.test = nil
	fmt.Fprintf(r.out, "%s  %-12s %-24s %4d passed %3d skipped %6.1f s\n", verdict, r.guest.name, run.name, run.passed, run.skipped, run.seconds)
	for _, s := range run.skips {
		fmt.Fprintln(r.out, "      "+s)
	}
	return nil
}

// output takes a line of a test binary's -test.v. What a test that passes says is left
// out unless verbose.
func (r *report) output(line string) {
	run := &r.runs[len(r.runs)-1]
	if r.verbose {
		fmt.Fprintln(r.out, line)
	}
	trimmed := strings.TrimSpace(line)
	r.test = append(r.test, line)
	switch {
	case strings.HasPrefix(trimmed, "--- PASS: "):
		run.passed++
	case strings.HasPrefix(trimmed, "--- SKIP: "):
		run.skipped++
		run.skips = append(run.skips, strings.TrimPrefix(trimmed, "--- ")+reason(r.test))
	case strings.HasPrefix(line, "=== RUN   ") && !strings.Contains(line, "/"):
		// A new test: what came before is of tests that have ended.
		if failed(r.test) {
			r.show(r.test)
		}
		r.test = nil
	}
}

// show prints the output of a test that failed, without the noise of -test.v.
func (r *report) show(lines []string) {
	if r.verbose {
		return
	}
	for _, l := range lines {
		t := strings.TrimSpace(l)
		noise := t == "" || t == "PASS"
		for _, p := range []string{"=== RUN", "=== PAUSE", "=== CONT", "=== NAME", "--- PASS"} {
			noise = noise || strings.HasPrefix(t, p)
		}
		if !noise {
			fmt.Fprintln(r.out, l)
		}
	}
}

func failed(lines []string) bool {
	for _, l := range lines {
		if strings.HasPrefix(strings.TrimSpace(l), "--- FAIL: ") {
			return true
		}
	}
	return false
}

// reason returns why the latest test was skipped, as it said just before.
func reason(lines []string) string {
	for i := len(lines) - 1; i >= 0; i-- {
		if at := strings.Index(lines[i], ": needs "); at >= 0 {
			return lines[i][at:]
		}
	}
	return ""
}
