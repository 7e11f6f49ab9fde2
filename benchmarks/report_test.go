//go:build linux

package main

import (
	"context"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func sampleReport() *report {
	r := &report{
		Machine: machine{When: "2026-01-02 03:04", CPU: "a processor", Kernel: "Linux 6.18", Go: "go1.26", Commit: "abc"},
		Systems: []string{"overlay2", "moby", "containerd", "limit1"},
		Data:    []string{"0123 1024 3 typical.tar"},
		Notes:   []string{"c/storage does not build: no such module"},
		results: newResults(context.Background()),
	}
	k := key{Row: rowApply, Data: "typical", FS: "tmpfs"}
	add := func(system, row, unit string, values ...float64) {
		k := k
		k.System, k.Row = system, row
		r.results.add(k, unit, values...)
	}
	add("overlay2", rowApply, unitTime, 2e8, 1e8, 3e8)
	add("moby", rowApply, unitTime, 8e8, 8e8, 8e8)
	add("containerd", rowApply, unitTime, 1e6)
	add("limit1", rowApply, unitTime, 1e8)
	add("overlay2", rowMixed, unitRate, 300)
	add("moby", rowMixed, unitRate, 100)
	add("overlay2", rowApplyPeak, unitBytes, 3<<20)
	add("moby", rowApplyPeak, unitBytes, 2<<20)
	add("moby", rowDiff, unitTime, 5e3)
	wrong := k
	wrong.System = "containerd"
	r.results.wrong(wrong, unitTime, "3 entries differ")
	failed := key{Row: rowDiff, Data: "typical", FS: "tmpfs", System: "limit1"}
	r.results.fail(failed, unitTime, errors.New("no space"))
	r.results.fail(key{Row: rowDiff, System: "tar"}, unitTime, errNoCounterpart)
	return r
}

func TestTable(t *testing.T) {
	text := sampleReport().text()
	for _, want := range []string{
		"a processor, Linux 6.18",
		"### In memory (tmpfs)",
		// The fast wrong answer of containerd is not the best peer.
		"| ApplyDiff, typical | 200 ms ±25% | 800 ms | wrong | 100 ms | 4x moby | 0.50x |",
		"| 300/s | 100/s |  |  | 3x moby |  |",
		"| Diff, large reads, typical |  | 5 µs |  | fails |  |  |",
		"- containerd gives a wrong answer at ApplyDiff, typical, tmpfs: 3 entries differ",
		"- limit1 fails at Diff, large reads, typical, tmpfs: no space",
		"- c/storage does not build",
		"### Where a peer is ahead\n\n- ApplyDiff, peak memory, typical, tmpfs: 3 MiB, moby has 2 MiB\n\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if err := sampleReport().ownFaults(); err != nil {
		t.Error("peers' faults are taken for our own:", err)
	}
	if strings.Contains(text, "no counterpart") {
		t.Error("a row that a system cannot have is told as a failure")
	}
}

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	page := filepath.Join(dir, "performance.md")
	if err := os.WriteFile(page, []byte("By hand\n"+markBegin+"\nold\n"+markEnd+"\nafter\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := sampleReport()
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(got); !strings.HasPrefix(s, "By hand\n") || !strings.HasSuffix(s, markEnd+"\nafter\n") ||
		strings.Contains(s, "old") || !strings.Contains(s, "800 ms") {
		t.Errorf("the page became\n%s", s)
	}
	if err := os.WriteFile(page, []byte("no marks"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.write(dir); err == nil {
		t.Error("a page without marks was written")
	}
}

func TestChart(t *testing.T) {
	d := xml.NewDecoder(strings.NewReader(sampleReport().chart()))
	bars := 0
	for {
		tok, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := tok.(xml.StartElement); ok && e.Name.Local == "rect" {
			bars++
		}
	}
	if bars != 1+4+3+2 { // the background, the legend, three bars and two: the wrong answer has none
		t.Errorf("%d rectangles", bars)
	}
}

func TestSaveAndLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	r := sampleReport()
	if err := r.save(path); err != nil {
		t.Fatal(err)
	}
	back, err := loadReports([]string{path})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := back.text(), r.text(); got != want {
		t.Errorf("another report came back:\n%s\nnot\n%s", got, want)
	}
	twice, err := loadReports([]string{path, path})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(twice.text(), "a processor"); got != 2 {
		t.Errorf("%d machines of two runs", got)
	}
	if got := len(twice.results.list[0].Values); got != 6 {
		t.Errorf("%d values of two runs with 3 each", got)
	}
}

func TestQuantiles(t *testing.T) {
	if m := median([]float64{4, 1, 3, 2}); m != 2.5 {
		t.Errorf("median %v", m)
	}
	if s := spread([]float64{1, 2, 3}); s != 0.25 {
		t.Errorf("spread %v", s)
	}
	if s := spread([]float64{0, 0}); s != 0 {
		t.Errorf("spread of nothing %v", s)
	}
}

func TestFormat(t *testing.T) {
	for _, c := range []struct {
		v          float64
		unit, want string
	}{
		{1500, unitTime, "1.50 µs"}, {12_345_678, unitTime, "12.3 ms"}, {2e9, unitTime, "2 s"},
		{3 << 19, unitBytes, "1.50 MiB"}, {1234.5, unitRate, "1234/s"}, {27, unitCount, "27"}, {6.678, unitCalls, "6.68"},
	} {
		if got := format(c.v, c.unit); got != c.want {
			t.Errorf("%v %s: %q, not %q", c.v, c.unit, got, c.want)
		}
	}
	if got := grouped(1234567); got != "1,234,567" {
		t.Error(got)
	}
}
