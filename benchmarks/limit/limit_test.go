//go:build linux

package limit

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// makeTree makes some directories of small files, a large file, links and a long name.
func makeTree(tb testing.TB, files int) string {
	tb.Helper()
	root := tb.TempDir()
	must := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(root, name) }
	for i := range files {
		name := at(fmt.Sprintf("dir%d/file%d", i%10, i))
		must(os.MkdirAll(filepath.Dir(name), 0o755))
		must(os.WriteFile(name, bytes.Repeat([]byte{byte(i)}, i*37%9000), 0o644))
	}
	must(os.WriteFile(at("large"), bytes.Repeat([]byte("overlay"), 600_000), 0o666))
	must(os.Chmod(at("large"), 0o666))
	must(os.Link(at("large"), at("dir0/link")))
	must(os.Symlink("large", at("symlink")))
	long := at(filepath.Join("dir1", strings.Repeat("long/", 30)))
	must(os.MkdirAll(long, 0o700))
	must(os.WriteFile(filepath.Join(long, strings.Repeat("n", 120)), []byte("x"), 0o600))
	for _, name := range []string{"dir0", "large", "dir1/long"} {
		must(os.Chtimes(at(name), time.Time{}, time.Unix(1_500_000_000, 0)))
	}
	return root
}

// listing is a tar as archive/tar reads it, a line an entry.
func listing(tb testing.TB, data []byte) string {
	tb.Helper()
	var b strings.Builder
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return b.String()
		}
		if err != nil {
			tb.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil {
			tb.Fatal(err)
		}
		fmt.Fprintf(&b, "%q %c %o %d %q %d %x\n", h.Name, h.Typeflag, h.Mode, h.Size, h.Linkname, h.ModTime.Unix(), body[:min(8, len(body))])
	}
}

func pack(tb testing.TB, dir string) []byte {
	tb.Helper()
	var b bytes.Buffer
	if err := Pack(dir, &b); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

func TestRoundTrip(t *testing.T) {
	from := makeTree(t, 300)
	data := pack(t, from)
	want := listing(t, data)
	if lines := strings.Count(want, "\n"); lines < 340 {
		t.Fatalf("only %d entries:\n%s", lines, want)
	}
	for workers := range 3 {
		to := t.TempDir()
		if err := Unpack(to, bytes.NewReader(data), workers); err != nil {
			t.Fatalf("%d workers: %v", workers, err)
		}
		if got := listing(t, pack(t, to)); got != want {
			t.Errorf("%d workers: the tree packs to something else", workers)
		}
		one, err := Usage(to, 1)
		if err != nil {
			t.Fatal(err)
		}
		two, err := Usage(from, 2)
		if err != nil {
			t.Fatal(err)
		}
		if one != two || one < 4_200_000 {
			t.Errorf("usage %d by one thread, %d by two of what it was made from", one, two)
		}
	}
}

// TestPAX reads what archive/tar writes with extended headers.
func TestPAX(t *testing.T) {
	name := strings.Repeat("directory/", 30) + "file"
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	parts := strings.Split(name, "/")
	for i := 1; i < len(parts); i++ {
		h := &tar.Header{Typeflag: tar.TypeDir, Name: strings.Join(parts[:i], "/") + "/", Mode: 0o755, Format: tar.FormatPAX}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: 3, Format: tar.FormatPAX}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("abc")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := Unpack(dir, &b, 0); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != "abc" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestCutOff(t *testing.T) {
	data := pack(t, makeTree(t, 50))
	for _, workers := range []int{0, 2} {
		err := Unpack(t.TempDir(), bytes.NewReader(data[:len(data)/2]), workers)
		if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			t.Errorf("%d workers: half a tar: %v", workers, err)
		}
	}
}

func TestChanges(t *testing.T) {
	upper, lower := t.TempDir(), t.TempDir()
	for _, name := range []string{filepath.Join(upper, "both"), filepath.Join(lower, "both"), filepath.Join(upper, "new")} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	list, err := Changes(upper, lower)
	if err != nil {
		t.Fatal(err)
	}
	if want := []Change{{'C', "/both"}, {'A', "/new"}}; !slices.Equal(list, want) {
		t.Errorf("%v, not %v", list, want)
	}
}

func BenchmarkUnpack(b *testing.B) {
	data := pack(b, makeTree(b, 2000))
	for workers := range 3 {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				b.StopTimer()
				dir := b.TempDir()
				b.StartTimer()
				if err := Unpack(dir, bytes.NewReader(data), workers); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkPack(b *testing.B) {
	dir := makeTree(b, 2000)
	b.ReportAllocs()
	for b.Loop() {
		if err := Pack(dir, struct{ io.Writer }{io.Discard}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkUsage(b *testing.B) {
	dir := makeTree(b, 2000)
	for _, workers := range []int{1, 2} {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Usage(dir, workers); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkChanges(b *testing.B) {
	dir := makeTree(b, 2000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Changes(dir, ""); err != nil {
			b.Fatal(err)
		}
	}
}
