//go:build linux

// Command vmtest runs the tests of this module in guests with other kernels than the
// host's: see docs/testing-vm.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// options are the command line's.
type options struct {
	repo, module, cache              string
	guests, packages, run, skip      string
	all, list, verbose, long, unsafe bool
	cuts                             int
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
	var failed []error
	start := time.Now()
	run := runGuest
	if o.cuts > 0 {
		run, chosen = runCuts, chosen[:1] // uml-6.1, if none is named
	}
	for _, g := range chosen {
		if err := run(ctx, o, g); err != nil {
			fmt.Printf("FAIL  %s: %v\n", g.name, err)
			failed = append(failed, fmt.Errorf("%s: %w", g.name, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	fmt.Printf("%d guests, %d failed, %.0f s\n", len(chosen), len(failed), time.Since(start).Seconds())
	return errors.Join(failed...)
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
func runGuest(ctx context.Context, o options, g guest) (err error) {
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
		silence: time.Duration(float64(silence) * o.slow)}
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
