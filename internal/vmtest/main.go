//go:build linux

// Command vmtest runs the tests of this module in guests with other kernels than the
// host's: see docs/testing-vm.md.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// options are the command line's.
type options struct {
	repo, module, cache              string
	guests, packages, run, skip      string
	all, list, verbose, long, unsafe bool
	cuts, jobs                       int
	slow                             float64
}

func main() {
	var o options
	flag.StringVar(&o.repo, "repo", ".", "the module's directory")
	flag.StringVar(&o.module, "module", "", "directory of a nested module to test instead, in uml guests")
	flag.StringVar(&o.cache, "cache", "", "directory for kernels (default: overlay2-vmtest in the user's cache)")
	flag.StringVar(&o.guests, "guest", "", "guests to run, separated by commas (default: the quick ones)")
	flag.StringVar(&o.packages, "pkg", "", "packages to test, as paths in the module, separated by commas; . is the top (default: all)")
	flag.StringVar(&o.run, "run", "", "tests to run, a regular expression as of go test")
	flag.StringVar(&o.skip, "skip", "", "tests to leave out, a regular expression as of go test (default: what takes long in the guest, unless -long, -pkg or -run)")
	flag.BoolVar(&o.all, "all", false, "run every guest")
	flag.BoolVar(&o.list, "list", false, "list the guests")
	flag.BoolVar(&o.long, "long", false, "run tests without -test.short")
	flag.IntVar(&o.cuts, "cuts", 0, "cut the power of a uml guest so many times while it works on layers")
	flag.BoolVar(&o.unsafe, "unsafe", false, "with -cuts: nothing is synced, and it must be seen")
	flag.IntVar(&o.jobs, "jobs", runtime.NumCPU(), "run so many guests at a time")
	flag.Float64Var(&o.slow, "slow", 1, "give guests so many times their time, for a busy host")
	flag.BoolVar(&o.verbose, "v", false, "show the whole console")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := vmtest(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vmtest:", err)
		os.Exit(1)
	}
}

func vmtest(ctx context.Context, o options) error {
	chosen, err := choose(o)
	if err != nil {
		return err
	}
	if o.list {
		for _, g := range chosen {
			fmt.Printf("%-14s %-8s tests need %s\n", g.name, g.arch, g.require)
		}
		return nil
	}
	if o.repo, err = filepath.Abs(o.repo); err != nil {
		return err
	}
	if o.cache == "" {
		if o.cache, err = os.UserCacheDir(); err != nil {
			return err
		}
		o.cache = filepath.Join(o.cache, "overlay2-vmtest")
	}
	if err := os.MkdirAll(o.cache, 0o755); err != nil {
		return err
	}
	if err := install(chosen); err != nil {
		return err
	}
	for _, g := range chosen { // before several guests want the same kernel at once
		if !g.uml {
			if _, err := kernelOf(g, o.cache); err != nil {
				fmt.Printf("%s: %v\n", g.name, err) // it will be tried again, and fail for that guest
			}
		}
	}
	run := runGuest
	if o.cuts > 0 {
		run, chosen = runCuts, chosen[:1] // uml-6.1, if none is named
	}
	return runAll(ctx, o, chosen, run)
}

// runAll runs guests, o.jobs at a time.
func runAll(ctx context.Context, o options, chosen []guest, run func(context.Context, options, guest, io.Writer) error) error {
	start := time.Now()
	jobs := max(1, min(o.jobs, len(chosen)))
	if jobs > 1 && jobs*guestCPUs > runtime.NumCPU() {
		o.slow *= 1.5 // they share processors
	}
	free := make(chan struct{}, jobs)
	results := make([]error, len(chosen))
	var all sync.WaitGroup
	var mu sync.Mutex
	for i, g := range chosen {
		free <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		out := &lineWriter{mu: &mu, w: os.Stdout}
		if jobs > 1 {
			out.prefix = g.name + ": "
		}
		all.Go(func() {
			defer func() { <-free }()
			if err := run(ctx, o, g, out); err != nil {
				fmt.Fprintf(out, "FAIL  %s: %v\n", g.name, err)
				results[i] = fmt.Errorf("%s: %w", g.name, err)
			}
		})
	}
	all.Wait()
	failed := 0
	for _, err := range results {
		if err != nil {
			failed++
		}
	}
	fmt.Printf("%d guests, %d failed, %.0f s\n", len(chosen), failed, time.Since(start).Seconds())
	return errors.Join(append(results, ctx.Err())...)
}

// lineWriter writes whole lines, each behind a prefix, to a writer that several share.
type lineWriter struct {
	mu     *sync.Mutex
	w      io.Writer
	prefix string
}

// Write takes text that ends with a line.
func (l *lineWriter) Write(text []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(text) {
		if _, err := fmt.Fprintf(l.w, "%s%s", l.prefix, line); err != nil {
			return 0, err
		}
	}
	return len(text), nil
}

// choose returns the guests to run.
func choose(o options) ([]guest, error) {
	names := split(o.guests)
	var chosen []guest
	for _, g := range guests() {
		if len(names) > 0 && selected(g.name, names) || len(names) == 0 && (o.all || o.list || !g.all) {
			chosen = append(chosen, g)
		}
	}
	if len(chosen) < len(names) || len(chosen) == 0 {
		return nil, fmt.Errorf("not all of %q are guests: see -list", names)
	}
	return chosen, nil
}

func split(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

// runGuest builds the tests for a guest and runs them in it.
func runGuest(ctx context.Context, o options, g guest, out io.Writer) (err error) {
	g.timeout = time.Duration(float64(g.timeout) * o.slow)
	tmp, err := os.MkdirTemp("", "vmtest-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	packages := split(o.packages)
	if len(packages) == 0 && !o.all {
		packages = g.quick
	}
	tests, guestInit, err := build(ctx, o.repo, o.module, tmp, g.arch, packages)
	if err != nil {
		return err
	}
	m := &machine{guest: g, dir: tmp, repo: o.repo, cache: o.cache, guestInit: guestInit, tests: tests, testArgs: testArgs(o, g),
		silence: time.Duration(float64(silence) * o.slow), out: out}
	r, err := m.run(ctx, o.verbose)
	if err != nil {
		return err
	}
	if r.failed {
		return errors.New("tests failed")
	}
	if len(r.runs) != len(tests) {
		return fmt.Errorf("%d of %d packages were tested", len(r.runs), len(tests))
	}
	return nil
}

// testArgs are the arguments of each test binary.
func testArgs(o options, g guest) []string {
	args := []string{"-test.v", "-test.timeout=" + g.timeout.String()}
	if o.run != "" {
		args = append(args, "-test.run="+o.run)
	}
	skip := o.skip
	if skip == "" && !o.long && o.run == "" && o.packages == "" {
		skip = g.skip
	}
	if skip != "" {
		args = append(args, "-test.skip="+skip)
	}
	if !o.long {
		args = append(args, "-test.short")
	}
	return args
}
