//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/bcc2decd/overlay2/benchmarks/wire"
)

// bench is a run of the harness.
type bench struct {
	ctx     context.Context
	systems []*system
	scratch *scratch
	results *results
	log     func(format string, args ...any)

	depths []int
	layers []int // homes to open
	cycles int   // of each of 64 goroutines
}

// sample is one run of one system on a filesystem of its own.
type sample struct {
	*bench
	sys  *system
	w    *worker
	dir  string // the filesystem
	home string
	fs   string
	data *dataset // nil for rows without
	rep  int      // the first is 0: what comes out is looked at then
}

func (s *sample) key(row string) key {
	k := key{Row: row, FS: s.fs, System: s.sys.name}
	if s.data != nil {
		k.Data = s.data.name
	}
	return k
}

// scenario is what a system does in one run.
type scenario struct {
	name string
	// row is the row that a failure is told in.
	row string
	run func(*sample) error
	// once is for what takes long to prepare, and measures several times by itself.
	once bool
}

// manyLayers is the number from which on a home takes long to fill.
const manyLayers = 50_000

// each runs a scenario reps times for each system: A B C, B C A, C A B, ...
func (b *bench) each(fs string, data *dataset, sc scenario, reps int) error {
	var able []*system
	for _, s := range b.systems {
		if s.broken == "" {
			able = append(able, s)
		}
	}
	gone := map[*system]bool{}
	for rep := range reps {
		for i := range able {
			s := able[(i+rep)%len(able)]
			if gone[s] {
				continue
			}
			if err := b.ctx.Err(); err != nil {
				return err
			}
			start := time.Now()
			err := b.one(s, fs, data, sc, rep)
			k := key{Row: sc.row, FS: fs, System: s.name}
			name := ""
			if data != nil {
				k.Data, name = data.name, data.name
			}
			note := ""
			if err != nil {
				gone[s] = true
				note = err.Error()
				b.results.fail(k, unitTime, err)
			}
			b.log("%s %s %s run %d %s: %.1f s %s", sc.name, name, fs, rep+1, s.name, time.Since(start).Seconds(), note)
		}
	}
	return b.ctx.Err()
}

func (b *bench) one(sys *system, fs string, data *dataset, sc scenario, rep int) (err error) {
	dir, free, err := b.scratch.fresh(fs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, free()) }()
	s := &sample{bench: b, sys: sys, dir: dir, home: filepath.Join(dir, "h"), fs: fs, data: data, rep: rep}
	if s.w, err = sys.start(b.ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.w.stop()) }()
	return sc.run(s)
}

// open opens the home and creates a first layer.
func (s *sample) open(durable bool) error {
	if _, err := s.w.call(wire.Request{Op: wire.OpOpen, Home: s.home, Durable: durable}); err != nil {
		return err
	}
	_, err := s.w.call(wire.Request{Op: wire.OpCreate, ID: "base"})
	return err
}

func (s *sample) apply(id, parent string, sync bool) (wire.Response, error) {
	return s.w.call(wire.Request{
		Op: wire.OpApply, ID: id, Parent: parent, Tar: s.data.tar, Tree: s.data.tree, Sync: sync,
	})
}

// took adds a time.
func (s *sample) took(row string, ns int64) { s.results.add(s.key(row), unitTime, float64(ns)) }

const (
	rowApply      = "ApplyDiff"
	rowApplySync  = "ApplyDiff + sync"
	rowApplyMany  = "ApplyDiff, 8 layers at once"
	rowApplyCPU   = "ApplyDiff, CPU seconds"
	rowApplyPeak  = "ApplyDiff, peak memory"
	rowApplyCalls = "ApplyDiff, system calls a file"
	rowDiff       = "Diff, large reads"
	rowDiffPipe   = "Diff, through an io.Pipe"
	rowDiffCPU    = "Diff, CPU seconds"
	rowDiffPeak   = "Diff, peak memory"
	rowDiffSize   = "DiffSize"
	rowChanges    = "Changes, whole layer"
	rowRemove     = "Remove"
	rowRemoveAll  = "Remove until the space is free"
	rowFewDiff    = "Diff of 1,000 changes"
	rowFewChanges = "Changes, 1,000 changes"
	rowCreate     = "Create, depth 16"
	rowMixed      = "64 goroutines: cycles of Create, Get, Put, Remove"
	rowSize       = "program that imports it, stripped"
	rowModules    = "modules linked"
)

func rowGetPut(depth int) string { return "Get + Put, depth " + strconv.Itoa(depth) }

func rowNew(layers int) string { return "New, " + grouped(layers) + " layers" }

// layerScenario takes one layer through its life.
func layerScenario() scenario {
	return scenario{name: "layer", row: rowApply, run: func(s *sample) error {
		if err := s.open(false); err != nil {
			return err
		}
		res, err := s.apply("base", "", false)
		if err != nil {
			return err
		}
		s.took(rowApply, res.Wall)
		s.results.add(s.key(rowApplyCPU), unitTime, float64(res.CPU))
		s.results.add(s.key(rowApplyPeak), unitBytes, float64(res.Peak))
		if err := s.checkTree(rowApply, "base"); err != nil {
			return err
		}
		return errors.Join(s.diff(), s.sizes(), s.remove())
	}}
}

// checkTree compares what came to lie on disk with what GNU tar makes of the tar.
func (s *sample) checkTree(row, id string) error {
	if s.rep > 0 && len(s.data.want) > 100_000 {
		return nil
	}
	res, err := s.w.call(wire.Request{Op: wire.OpUpper, ID: id})
	if err != nil {
		return err
	}
	got, err := manifest(res.Path)
	if err != nil {
		return err
	}
	s.results.wrong(s.key(row), unitTime, differences(s.data.want, got))
	return nil
}

func (s *sample) diff() error {
	for _, m := range []struct{ mode, row string }{{wire.ModeLarge, rowDiff}, {wire.ModePipe, rowDiffPipe}} {
		res, err := s.w.call(wire.Request{Op: wire.OpDiff, ID: "base", Mode: m.mode})
		if err != nil {
			s.results.fail(s.key(m.row), unitTime, err)
			return nil
		}
		s.took(m.row, res.Wall)
		if m.row == rowDiff {
			s.results.add(s.key(rowDiffCPU), unitTime, float64(res.CPU))
			s.results.add(s.key(rowDiffPeak), unitBytes, float64(res.Peak))
		}
	}
	if s.rep > 0 {
		return nil
	}
	return s.checkDiff()
}

// checkDiff has GNU tar unpack the diff and compares that with what the layer came from.
func (s *sample) checkDiff() (err error) {
	dir, free, err := s.scratch.fresh("tmpfs")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, free()) }()
	out := filepath.Join(dir, "diff.tar")
	if _, err := s.w.call(wire.Request{Op: wire.OpDiff, ID: "base", Mode: wire.ModeLarge, Out: out}); err != nil {
		s.results.fail(s.key(rowDiff), unitTime, err)
		return nil
	}
	tree := filepath.Join(dir, "tree")
	if err := untar(out, tree); err != nil {
		s.results.wrong(s.key(rowDiff), unitTime, err.Error())
		return nil
	}
	got, err := manifest(tree)
	if err != nil {
		return err
	}
	s.results.wrong(s.key(rowDiff), unitTime, differences(s.data.want, got))
	s.results.wrong(s.key(rowDiffPipe), unitTime, differences(s.data.want, got))
	return nil
}

func (s *sample) sizes() error {
	for _, m := range []struct{ op, row string }{{wire.OpDiffSize, rowDiffSize}, {wire.OpChanges, rowChanges}} {
		res, err := s.w.call(wire.Request{Op: m.op, ID: "base"})
		if err != nil {
			s.results.fail(s.key(m.row), unitTime, err)
			continue
		}
		s.took(m.row, res.Wall)
		if m.op == wire.OpChanges && res.Bytes != int64(len(s.data.want)) {
			s.results.wrong(s.key(m.row), unitTime, fmt.Sprintf("%d changes, not %d", res.Bytes, len(s.data.want)))
		}
		if m.op == wire.OpDiffSize && s.sys.name != "containerd" { // which counts blocks
			if want, err := contentSize(s.data.tree); err != nil {
				return err
			} else if res.Bytes != want {
				s.results.wrong(s.key(m.row), unitTime, fmt.Sprintf("%d bytes, not %d", res.Bytes, want))
			}
		}
	}
	return nil
}

func (s *sample) remove() error {
	res, err := s.w.call(wire.Request{Op: wire.OpRemove, ID: "base"})
	if err != nil {
		s.results.fail(s.key(rowRemove), unitTime, err)
		return nil
	}
	if s.sys.role != tool {
		s.took(rowRemove, res.Wall)
		s.took(rowRemoveAll, res.Drain)
	}
	return nil
}

// syncScenario unpacks a layer so that it survives a power cut.
func syncScenario() scenario {
	return scenario{name: "sync", row: rowApplySync, run: func(s *sample) error {
		if err := s.open(true); err != nil {
			return err
		}
		res, err := s.apply("base", "", true)
		if err != nil {
			return err
		}
		s.took(rowApplySync, res.Wall+res.Sync)
		return nil
	}}
}

// manyScenario unpacks eight layers at once.
func manyScenario() scenario {
	return scenario{name: "many", row: rowApplyMany, run: func(s *sample) error {
		if s.sys.role == tool {
			return nil
		}
		if err := s.open(false); err != nil {
			return err
		}
		res, err := s.w.call(wire.Request{Op: wire.OpApplyMany, ID: "layer", Tar: s.data.tar, Count: 8})
		if err != nil {
			return err
		}
		s.took(rowApplyMany, res.Wall)
		for i := range 8 {
			if err := s.checkTree(rowApplyMany, "layer-"+strconv.Itoa(i)); err != nil || s.rep > 0 {
				return err
			}
		}
		return nil
	}}
}

// mountScenario makes chains and mounts them, at each depth that the system can have.
func mountScenario() scenario {
	return scenario{name: "mount", row: rowGetPut(1), run: func(s *sample) error {
		if s.sys.role == tool {
			return nil
		}
		if err := s.open(false); err != nil {
			return err
		}
		parent, have := "base", 1
		for _, depth := range slices.Sorted(slices.Values(s.depths)) {
			var err error
			if parent, err = s.chain(parent, have, depth); err == nil {
				have = depth
				err = s.mountAt(depth, parent)
			}
			if err != nil {
				s.results.fail(s.key(rowGetPut(depth)), unitTime, err)
				break
			}
		}
		return s.mixed()
	}}
}

// chain lengthens a chain of layers and returns its end.
func (s *sample) chain(parent string, have, depth int) (string, error) {
	if depth <= have {
		return parent, nil
	}
	prefix := "chain" + strconv.Itoa(depth)
	_, err := s.w.call(wire.Request{Op: wire.OpChain, ID: prefix, Parent: parent, Count: depth - have})
	return prefix + "-" + strconv.Itoa(depth-have-1), err
}

func (s *sample) mountAt(depth int, parent string) error {
	top := "top" + strconv.Itoa(depth)
	if _, err := s.w.call(wire.Request{Op: wire.OpCreate, ID: top, Parent: parent}); err != nil {
		return err
	}
	// The first mount may find out things that later ones know.
	if _, err := s.w.call(wire.Request{Op: wire.OpGetPut, ID: top, Count: 2}); err != nil {
		return err
	}
	res, err := s.w.call(wire.Request{Op: wire.OpGetPut, ID: top, Count: 30})
	if err != nil {
		return err
	}
	s.samples(rowGetPut(depth), res)
	if depth != 16 {
		return nil
	}
	if res, err = s.w.call(wire.Request{Op: wire.OpCreate, ID: "many", Parent: parent, Count: 100}); err != nil {
		return err
	}
	s.samples(rowCreate, res)
	return nil
}

// samples keeps the median of the calls of one run as the run's value.
func (s *sample) samples(row string, res wire.Response) {
	values := make([]float64, len(res.Samples))
	for i, v := range res.Samples {
		values[i] = float64(v)
	}
	s.results.add(s.key(row), unitTime, median(values))
}

func (s *sample) mixed() error {
	const workers = 64
	// A layer on the base again, for this is not about depth.
	if _, err := s.w.call(wire.Request{Op: wire.OpCreate, ID: "sibling", Parent: "base"}); err != nil {
		return err
	}
	res, err := s.w.call(wire.Request{Op: wire.OpMixed, Parent: "base", Workers: workers, Count: s.cycles})
	if err != nil {
		s.results.fail(s.key(rowMixed), unitRate, err)
		return nil
	}
	s.results.add(s.key(rowMixed), unitRate, float64(workers*s.cycles)/(float64(res.Wall)/1e9))
	return nil
}

// newScenario opens a home with many layers in it, in a new process each time.
func newScenario(layers int) scenario {
	row := rowNew(layers)
	return scenario{name: "new", row: row, once: layers > manyLayers, run: func(s *sample) error {
		if s.sys.role == tool || s.sys.role == limits {
			return nil
		}
		if err := s.open(false); err != nil {
			return err
		}
		if _, err := s.w.call(wire.Request{Op: wire.OpCreate, ID: "layer", Parent: "base", Count: layers}); err != nil {
			return err
		}
		if err := s.w.stop(); err != nil {
			return err
		}
		var err error
		for range 5 {
			if s.w, err = s.sys.start(s.ctx); err != nil {
				return err
			}
			res, err := s.w.call(wire.Request{Op: wire.OpOpen, Home: s.home})
			if err != nil {
				return err
			}
			s.took(row, res.Wall)
			if err := s.w.stop(); err != nil {
				return err
			}
		}
		return nil
	}}
}

// contentSize adds up a tree as DiffSize must: hard links once, no directories.
func contentSize(root string) (total int64, err error) {
	seen := map[[2]uint64]bool{}
	err = filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		size, id, err := sizeOf(path)
		if !seen[id] {
			total += size
		}
		seen[id] = true
		return err
	})
	return total, err
}
