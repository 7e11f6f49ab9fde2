package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// scaleTar writes a tar of many entries, of one large directory, and of one large file.
type scaleTar struct {
	entries int   // in directories of 1,000
	names   int   // in one directory
	size    int64 // of one file
}

func (s scaleTar) write(w io.Writer) error {
	tw := tar.NewWriter(w)
	file := func(name string, size int64) error {
		return tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: size, ModTime: time.Unix(1e9, 0)})
	}
	dir := func(name string) error {
		return tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(1e9, 0)})
	}
	for i := range s.entries {
		if i%1000 == 0 {
			if err := dir(fmt.Sprintf("d%d/", i/1000)); err != nil {
				return err
			}
		}
		if err := file(fmt.Sprintf("d%d/f%d", i/1000, i), 0); err != nil {
			return err
		}
	}
	if err := dir("names/"); err != nil {
		return err
	}
	for i := range s.names {
		if err := file(fmt.Sprintf("names/a-name-of-usual-length-%d", i), 0); err != nil {
			return err
		}
	}
	if err := file("large", s.size); err != nil {
		return err
	}
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i * 7)
	}
	for left := s.size; left > 0; left -= int64(len(block)) {
		if _, err := tw.Write(block[:min(left, int64(len(block)))]); err != nil {
			return err
		}
	}
	return tw.Close()
}

// TestScale unpacks and packs a layer of very many entries, with a very large directory and a very
// large file in it: the heap stays bounded. OVERLAY2_TEST_SCALE=1 has 5 million
// entries, a directory of a million names and a file of 10 GiB; it needs some 25 GB in TMPDIR. "names" has
// only the directory of a million names. Changes is asked of this directory alone: what it returns
// takes memory for each path.
func TestScale(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	// More names than are held at a time.
	s := scaleTar{entries: 2_000, names: 2*maxNames + 1000, size: 64 << 20}
	if testing.Short() {
		s.names = maxNames + 1000 // a guest takes a millisecond for each
	}
	if os.Getenv("OVERLAY2_TEST_SCALE") != "" {
		s = scaleTar{entries: 4_000_000, names: 1_000_000, size: 10 << 30}
		if n := os.Getenv("OVERLAY2_TEST_SCALE"); n == "names" {
			s.entries, s.size = 0, 1<<20
		}
	}
	const limit = 100 << 20
	// The heap is what lives: garbage is collected before it would count.
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(80 << 20))
	dir := filepath.Join(t.TempDir(), "layer")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var entries, size int64
	steps := []struct {
		name string
		run  func(ctx context.Context) error
	}{
		{"unpack", func(ctx context.Context) error {
			r, w := io.Pipe()
			defer r.Close()
			go func() { w.CloseWithError(s.write(w)) }()
			stats, err := Unpack(ctx, dir, r, UnpackOptions{})
			entries, size = stats.Entries, stats.Size
			return err
		}},
		{"pack", func(ctx context.Context) error {
			r, err := Pack(ctx, dir, PackOptions{})
			if err != nil {
				return err
			}
			if _, err := io.CopyBuffer(io.Discard, onlyReader{r}, make([]byte, 1<<20)); err != nil {
				return err
			}
			if stats := r.Stats(); stats.Entries != entries || stats.Size != size {
				t.Errorf("packed %d entries of %d bytes, unpacked %d of %d", stats.Entries, stats.Size, entries, size)
			}
			return r.Close()
		}},
		{"usage", func(ctx context.Context) error {
			stats, err := Usage(ctx, dir)
			if err == nil && stats.Size != size {
				t.Errorf("size %d, want %d", stats.Size, size)
			}
			return err
		}},
		{"changes", func(ctx context.Context) error {
			changes, err := Changes(ctx, filepath.Join(dir, "names"), ReadOptions{})
			return errors.Join(err, allAdded(changes, s.names))
		}},
		{"compare", func(ctx context.Context) error {
			changes, err := Compare(ctx, filepath.Join(dir, "names"), "")
			return errors.Join(err, allAdded(changes, s.names))
		}},
	}
	for _, step := range steps {
		start := time.Now()
		peak, err := heapPeak(func() error { return step.run(context.Background()) })
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		t.Logf("%s: %d entries, %d bytes, heap up to %d MiB, %v", step.name, entries, size, peak>>20, time.Since(start).Round(time.Millisecond))
		if peak > limit {
			t.Errorf("%s: heap of %d MiB", step.name, peak>>20)
		}
	}
}

// allAdded says whether the changes are n additions in order.
func allAdded(changes []Change, n int) error {
	if len(changes) != n {
		return fmt.Errorf("%d changes, want %d", len(changes), n)
	}
	for i, c := range changes {
		if c.Kind != Added || (i > 0 && c.Path <= changes[i-1].Path) {
			return fmt.Errorf("change %d is %v", i, c)
		}
	}
	return nil
}

type onlyReader struct{ io.Reader }

// heapPeak returns how large the heap was at most while f ran.
func heapPeak(f func() error) (peak uint64, err error) {
	runtime.GC()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			peak = max(peak, m.HeapAlloc)
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	err = f()
	close(stop)
	<-done
	return peak, err
}
