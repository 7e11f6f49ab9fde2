//go:build linux

// Command benchmarks measures this library, its peers and the limits side by side: the
// same job on the same data in the same run, in turn, with the answers looked at.
//
//	benchmarks [-quick] [-json FILE] [-report DOCS]    measures
//	benchmarks -from FILE,... -report DOCS             writes the report of earlier runs
//
// It must be run as root, on Linux; without root only the size of the programs is told.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command(ctx, os.Args[1:])
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchmarks:", err)
		os.Exit(1)
	}
}

type options struct {
	quick   bool
	data    string
	images  string
	jsonOut string
	from    string
	report  string
	only    string
	rows    string
	sets    string
	fs      string
	reps    int
	root    string
}

func parse(args []string) (*options, error) {
	o := &options{}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = "/var/tmp"
	}
	f := flag.NewFlagSet("benchmarks", flag.ContinueOnError)
	f.BoolVar(&o.quick, "quick", false, "small data, memory only, few runs: under five minutes")
	f.StringVar(&o.data, "data", filepath.Join(cache, "overlay2-benchmarks"), "`directory` that keeps the data and the programs")
	f.StringVar(&o.images, "images", "/dev/shm", "`directory` for the images of ext4 and xfs; in memory, so that no disk is measured")
	f.StringVar(&o.jsonOut, "json", "", "`file` to write the results to")
	f.StringVar(&o.from, "from", "", "`files` of earlier results to report, with commas; nothing is measured")
	f.StringVar(&o.report, "report", "", "docs `directory` whose performance.md and performance.svg are brought up to date")
	f.StringVar(&o.only, "systems", "", "`names` of systems, with commas; all if empty")
	f.StringVar(&o.rows, "scenarios", "", "`names` of layer, sync, many, changes, mount, new, calls; all if empty")
	f.StringVar(&o.sets, "sets", "", "`names` of quick, typical, many-small, few-big")
	f.StringVar(&o.fs, "fs", "", "`names` of tmpfs, ext4, xfs")
	f.IntVar(&o.reps, "reps", 0, "runs of each scenario")
	f.StringVar(&o.root, "module", ".", "`directory` of the benchmarks module")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q", f.Arg(0))
	}
	defaults := options{sets: "typical,many-small,few-big,quick", fs: "tmpfs,ext4,xfs", reps: 5}
	if o.quick {
		defaults = options{sets: "quick", fs: "tmpfs", reps: 2}
	}
	if o.sets == "" {
		o.sets = defaults.sets
	}
	if o.fs == "" {
		o.fs = defaults.fs
	}
	if o.reps == 0 {
		o.reps = defaults.reps
	}
	return o, nil
}

// wants reports whether a list with commas names something; an empty one names all.
func wants(list, name string) bool {
	return list == "" || slices.Contains(strings.Split(list, ","), name)
}

func command(ctx context.Context, args []string) error {
	o, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	var rep *report
	if o.from != "" {
		rep, err = loadReports(strings.Split(o.from, ","))
	} else {
		rep, err = measureAll(ctx, o)
	}
	if rep == nil {
		return err
	}
	// What was measured before something went wrong is worth having.
	fmt.Print(rep.text())
	if o.jsonOut != "" {
		err = errors.Join(err, rep.save(o.jsonOut))
	}
	if o.report != "" {
		err = errors.Join(err, rep.write(o.report))
	}
	return errors.Join(err, rep.ownFaults())
}

func measureAll(ctx context.Context, o *options) (rep *report, err error) {
	if o.root, err = filepath.Abs(o.root); err != nil {
		return nil, err
	}
	bin := filepath.Join(o.data, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return nil, err
	}
	start := time.Now()
	log := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1f  %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	b := &bench{
		ctx: ctx, results: newResults(ctx), log: log,
		depths: []int{1, 16, 64, 127, 500}, layers: []int{10, 10_000, 100_000}, cycles: 20,
	}
	if o.quick {
		b.layers = []int{10, 1000}
	}
	for _, s := range allSystems() {
		if !wants(o.only, s.name) {
			continue
		}
		s.build(ctx, o.root, bin)
		if s.broken != "" {
			log("%s: no rows: %s", s.name, s.broken)
			if s.role == ours {
				b.results.fail(key{Row: "build", System: s.name}, unitCount, errors.New(s.broken))
			}
		}
		b.systems = append(b.systems, s)
	}
	rep = &report{Machine: describeMachine(o.root), results: b.results}
	for _, s := range b.systems {
		rep.Systems = append(rep.Systems, s.name)
		if s.broken != "" {
			rep.Notes = append(rep.Notes, s.name+" "+s.broken)
		}
	}
	b.imports()
	if os.Geteuid() != 0 {
		log("not root: nothing can be mounted or unpacked, so only the sizes of programs are told")
		return rep, nil
	}
	return rep, b.all(o, rep)
}

func (b *bench) all(o *options, rep *report) (err error) {
	dir, err := os.MkdirTemp("/tmp", "o2b")
	if err != nil {
		return err
	}
	b.scratch = &scratch{dir: dir, images: o.images}
	defer func() { err = errors.Join(err, b.scratch.cleanUp()) }()
	witnesses, free, err := b.scratch.fresh("tmpfs")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, free()) }()

	var sets []*dataset
	var missing error // what could not be made is told again at the end
	for _, name := range strings.Split(o.sets, ",") {
		d, err := makeData(b.ctx, o.root, o.data, name)
		if err == nil {
			err = d.witness(witnesses)
		}
		if err != nil {
			b.log("%s: no rows: %v", name, err)
			rep.Notes = append(rep.Notes, err.Error())
			missing = errors.Join(missing, err)
			continue
		}
		b.log("data %s", d.line)
		rep.Data = append(rep.Data, d.line)
		sets = append(sets, d)
	}
	for _, fs := range strings.Split(o.fs, ",") {
		if why := b.scratch.available(fs); why != "" {
			b.log("%s: no rows: %s", fs, why)
			rep.Notes = append(rep.Notes, fs+": "+why)
			continue
		}
		if err := b.onFS(o, fs, sets); err != nil {
			return err
		}
	}
	if wants(o.rows, "calls") && len(sets) > 0 {
		err = b.calls(smallest(sets))
	}
	return errors.Join(err, missing)
}

// smallest returns the set with the fewest bytes.
func smallest(sets []*dataset) *dataset {
	return slices.MinFunc(sets, func(a, b *dataset) int { return cmp.Compare(a.bytes, b.bytes) })
}

// onFS runs everything that was asked for on one kind of filesystem.
func (b *bench) onFS(o *options, fs string, sets []*dataset) error {
	type part struct {
		data *dataset
		sc   scenario
	}
	var parts []part
	for i, d := range sets {
		// The small set is for what is done eight times, or under strace.
		if len(sets) == 1 || d.name != "quick" {
			parts = append(parts, part{d, layerScenario()})
			if fs != "tmpfs" {
				parts = append(parts, part{d, syncScenario()})
			}
		}
		if i == 0 {
			parts = append(parts, part{d, changesScenario()})
		}
	}
	if len(sets) > 0 {
		parts = append(parts, part{smallest(sets), manyScenario()})
	}
	parts = append(parts, part{nil, mountScenario()})
	for _, n := range b.layers {
		if n > manyLayers && fs != "tmpfs" {
			continue
		}
		parts = append(parts, part{nil, newScenario(n)})
	}
	for _, p := range parts {
		if !wants(o.rows, p.sc.name) {
			continue
		}
		reps := o.reps
		if p.sc.once {
			reps = 1
		}
		if err := b.each(fs, p.data, p.sc, reps); err != nil {
			return err
		}
	}
	return nil
}

// describeMachine says what was measured on, as far as it can be found out.
func describeMachine(root string) machine {
	m := machine{When: time.Now().UTC().Format("2006-01-02 15:04"), CPU: cpuModel()}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load, _, _ = strings.Cut(string(load), " ")
	}
	for _, c := range []struct {
		to   *string
		args []string
	}{
		{&m.Kernel, []string{"uname", "-srm"}},
		{&m.Go, []string{"go", "env", "GOVERSION"}},
		{&m.Commit, []string{"git", "-C", root, "describe", "--always", "--dirty"}},
	} {
		if out, err := exec.Command(c.args[0], c.args[1:]...).Output(); err == nil {
			*c.to = strings.TrimSpace(string(out))
		}
	}
	return m
}
