//go:build linux

package main

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// smallData writes a tar with enough files for the plan of a thousand changes.
func smallData(t *testing.T, files int) *dataset {
	t.Helper()
	dir := t.TempDir()
	d := &dataset{name: "small", tar: filepath.Join(dir, "small.tar"), entries: files}
	f, err := os.Create(d.tar)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	write := func(h *tar.Header, body string) {
		t.Helper()
		h.Size, h.Format = int64(len(body)), tar.FormatUSTAR
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range files {
		if i%100 == 0 {
			write(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%03d/", i/100), Mode: 0o755}, "")
		}
		write(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d%03d/f%05d", i/100, i), Mode: 0o644, Uid: i % 3}, strings.Repeat("x", i%2000))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.witness(dir); err != nil {
		t.Fatal(err)
	}
	return d
}

// testBench builds the workers that this module holds and mounts beneath a directory of its own.
func testBench(t *testing.T, names ...string) *bench {
	t.Helper()
	overlaytest.Require(t, "root")
	dir, err := os.MkdirTemp("", "o2b")
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{
		ctx: t.Context(), scratch: &scratch{dir: dir, images: dir}, results: newResults(t.Context()), log: t.Logf,
		depths: []int{1, 3}, layers: []int{3}, cycles: 2,
	}
	t.Cleanup(func() {
		if err := b.scratch.cleanUp(); err != nil {
			t.Error(err)
		}
	})
	bin := t.TempDir()
	for _, s := range allSystems() {
		for _, name := range names {
			if s.name == name {
				if s.build(t.Context(), ".", bin); s.broken != "" {
					t.Fatal(s.broken)
				}
				b.systems = append(b.systems, s)
			}
		}
	}
	return b
}

// TestScenarios runs each scenario once and expects every row, with right answers.
func TestScenarios(t *testing.T) {
	b := testBench(t, "overlay2", "limit1", "limitN", "tar", "cp -a")
	data := smallData(t, 1500)
	for _, sc := range []scenario{layerScenario(), syncScenario(), changesScenario(), manyScenario(), mountScenario(), newScenario(3)} {
		if err := b.each("tmpfs", data, sc, 2); err != nil {
			t.Fatal(sc.name, err)
		}
	}
	rows := map[string]int{}
	for _, res := range b.results.list {
		if res.Wrong != "" || res.Failed != "" {
			t.Errorf("%s %s: wrong %q, failed %q", res.Row, res.System, res.Wrong, res.Failed)
		}
		if res.System == "overlay2" {
			rows[res.Row] += len(res.Values)
		}
	}
	for _, row := range []string{
		rowApply, rowApplySync, rowApplyMany, rowApplyCPU, rowApplyPeak, rowDiff, rowDiffPipe, rowDiffCPU, rowDiffPeak,
		rowDiffSize, rowChanges, rowRemove, rowRemoveAll, rowFewDiff, rowFewChanges, rowMixed, rowGetPut(1), rowGetPut(3),
	} {
		if rows[row] != 2 {
			t.Errorf("%s has %d values of 2 runs", row, rows[row])
		}
	}
	if rows[rowNew(3)] != 10 {
		t.Errorf("%d values of New", rows[rowNew(3)])
	}
}

// TestWrongAnswer expects a layer that is not what the tar holds to be found out.
func TestWrongAnswer(t *testing.T) {
	b := testBench(t, "limit1")
	data := smallData(t, 200)
	data.want[7] = strings.Replace(data.want[7], "100644", "100600", 1)
	if err := b.each("tmpfs", data, layerScenario(), 1); err != nil {
		t.Fatal(err)
	}
	l := b.results.lines()[0]
	if res := l.cells["limit1"]; !strings.Contains(res.Wrong, "1 entries differ") {
		t.Errorf("wrong is %q", res.Wrong)
	}
	if _, ok := l.value("limit1"); ok {
		t.Error("a wrong answer has a value")
	}
}

// TestBroken expects a system that does not build, and one that dies, to lose its rows only.
func TestBroken(t *testing.T) {
	b := testBench(t, "limit1")
	gone := &system{name: "gone", dir: "no/such/directory"}
	if gone.build(t.Context(), ".", t.TempDir()); gone.broken == "" {
		t.Error("what is not there was built")
	}
	dies := &system{name: "dies", program: "/bin/false"}
	b.systems = append([]*system{gone, dies}, b.systems...)
	if err := b.each("tmpfs", smallData(t, 20), layerScenario(), 1); err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, res := range b.results.list {
		found[res.System] = true
		if (res.System == "dies") != (res.Failed != "") {
			t.Errorf("%s %s: failed is %q", res.System, res.Row, res.Failed)
		}
	}
	if found["gone"] || !found["dies"] || !found["limit1"] {
		t.Errorf("results of %v", found)
	}
}

func TestPlan(t *testing.T) {
	overlaytest.Require(t, "root") // the data has owners
	d := smallData(t, 1500)
	p, err := makePlan(d.tree)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.modified) != 400 || len(p.deleted) != 300 || len(p.added) != 300 {
		t.Fatalf("%d modified, %d deleted, %d added", len(p.modified), len(p.deleted), len(p.added))
	}
	var lines []string
	for _, n := range p.modified {
		lines = append(lines, "C /"+n)
	}
	for _, n := range p.deleted {
		lines = append(lines, "D /"+n)
	}
	for _, n := range p.added {
		lines = append(lines, "A /"+n)
	}
	if why := p.checkList(append(lines, "C /d000")); why != "" {
		t.Error(why)
	}
	if why := p.checkList(lines[1:]); why == "" {
		t.Error("a missing change was not found")
	}
	if why := p.checkList(append(lines, "A /other")); why == "" {
		t.Error("a change too many was not found")
	}
	if _, err := makePlan(t.TempDir()); err == nil {
		t.Error("a plan for an empty tree")
	}
}
