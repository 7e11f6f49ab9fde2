package overlay2

import (
	"bytes"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// The benchmarks of a Driver's calls, each alone and in memory, with allocations, for benchstat:
//
//	go test -run '^$' -bench Driver -count 10 . >old; ...; benchstat old new
//
// What they cost beside other drivers is measured in the module benchmarks.

func benchDriver(b *testing.B) *Driver {
	b.Helper()
	overlaytest.Require(b, "root", "overlay")
	d, err := New(filepath.Join(overlaytest.MountFS(b, overlaytest.FS{Name: "tmpfs", Options: "nr_inodes=0"}), "home"), Options{})
	must(b, err)
	b.Cleanup(func() { must(b, d.Cleanup()) })
	b.ReportAllocs()
	return d
}

// benchTar is a layer of some thousand files in some hundred directories.
func benchTar(b *testing.B) []byte {
	b.Helper()
	var entries []tarEntry
	for i := range 200 {
		entries = append(entries, file(fmt.Sprintf("d%d/", i), ""))
		for j := range 20 {
			entries = append(entries, file(fmt.Sprintf("d%d/f%d", i, j), strings.Repeat("x", j*100)))
		}
	}
	return makeTar(b, entries...)
}

func BenchmarkDriverNew(b *testing.B) {
	for _, layers := range []int{10, 10_000} {
		b.Run(sizeName(layers), func(b *testing.B) {
			d := benchDriver(b)
			must(b, d.Create("base", "", nil))
			for i := range layers {
				must(b, d.Create(fmt.Sprint("layer", i), "base", nil))
			}
			must(b, d.Cleanup())
			for b.Loop() {
				again, err := New(d.home, Options{})
				must(b, err)
				must(b, again.Cleanup())
			}
		})
	}
}

func BenchmarkDriverCreateRemove(b *testing.B) {
	for _, depth := range []int{1, 16, 127} {
		b.Run(sizeName(depth), func(b *testing.B) {
			d := benchDriver(b)
			parent := deepChain(b, d, depth)
			for b.Loop() {
				must(b, d.CreateReadWrite("box", parent, nil))
				must(b, d.Remove("box"))
			}
		})
	}
}

func BenchmarkDriverGetPut(b *testing.B) {
	for _, depth := range benchDepths {
		b.Run(sizeName(depth), func(b *testing.B) {
			d := benchDriver(b)
			must(b, d.CreateReadWrite("box", deepChain(b, d, depth), nil))
			for b.Loop() {
				_, err := d.Get("box", "")
				must(b, err)
				must(b, d.Put("box"))
			}
		})
	}
}

func BenchmarkDriverExists(b *testing.B) {
	d := benchDriver(b)
	must(b, d.Create("base", "", nil))
	for b.Loop() {
		if !d.Exists("base") {
			b.Fatal("it does not exist")
		}
	}
}

func BenchmarkDriverApplyDiff(b *testing.B) {
	d := benchDriver(b)
	data := benchTar(b)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		apply(b, d, "layer", "", data)
		must(b, d.Remove("layer"))
	}
}

func BenchmarkDriverDiff(b *testing.B) {
	d := benchDriver(b)
	data := benchTar(b)
	apply(b, d, "layer", "", data)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		r, err := d.Diff("layer", "")
		must(b, err)
		_, err = io.Copy(io.Discard, r)
		must(b, err)
		must(b, r.Close())
	}
}

func BenchmarkDriverDiffSize(b *testing.B) {
	d := benchDriver(b)
	apply(b, d, "layer", "", benchTar(b))
	for b.Loop() { // it has no child, so that it is not remembered
		_, err := d.DiffSize("layer", "")
		must(b, err)
	}
}

func BenchmarkDriverChanges(b *testing.B) {
	d := benchDriver(b)
	data := benchTar(b)
	apply(b, d, "base", "", data)
	must(b, d.Create("layer", "base", nil))
	_, err := d.ApplyDiff("layer", "base", bytes.NewReader(makeTar(b, file("d1/f1", "other"), file("d7/new", "new"))))
	must(b, err)
	for b.Loop() {
		_, err := d.Changes("layer", "base")
		must(b, err)
	}
}

// BenchmarkDriverParallel is a container's life by 64 goroutines at a time.
func BenchmarkDriverParallel(b *testing.B) {
	d := benchDriver(b)
	must(b, d.Create("base", "", nil))
	must(b, d.Create("image", "base", nil))
	var n atomic.Int64
	b.SetParallelism(32) // for each of two processors
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			id := fmt.Sprint("box", n.Add(1))
			must(b, d.CreateReadWrite(id, "image", nil))
			_, err := d.Get(id, "")
			must(b, err)
			must(b, d.Put(id))
			must(b, d.Remove(id))
		}
	})
}
