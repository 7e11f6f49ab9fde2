package overlay2

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// TestDiffSparse: Diff tells holes as zeros, as images need it, or leaves them out if that is asked for. Both give
// the same content.
func TestDiffSparse(t *testing.T) {
	const size = 10 << 20
	home := t.TempDir()
	plain := newTestDriver(t, home, Options{})
	sparse := openTestDriver(t, home, Options{SparseDiffs: true})
	must(t, plain.Create("base", "", nil))
	must(t, plain.CreateReadWrite("box", "base", nil))
	path, put := get(t, plain, "box")
	f, err := os.Create(filepath.Join(path, "holes"))
	must(t, err)
	_, err = f.WriteAt([]byte("data"), size/2)
	must(t, err)
	must(t, f.Truncate(size))
	must(t, f.Close())
	put()
	for _, parent := range []string{"base", ""} { // the native way and the other
		full, short := readDiff(t, plain, "box", parent), readDiff(t, sparse, "box", parent)
		if len(full) < size || len(short) > size/10 {
			t.Errorf("parent %q: %d bytes with the holes, %d without", parent, len(full), len(short))
		}
		r := tar.NewReader(bytes.NewReader(full))
		for h, err := r.Next(); err != io.EOF; h, err = r.Next() {
			must(t, err)
			if h.Name != "holes" && h.Typeflag == tar.TypeReg {
				t.Errorf("an entry %q", h.Name)
			}
			if len(h.PAXRecords["GNU.sparse.major"]) > 0 {
				t.Error("a sparse entry")
			}
		}
		for name, data := range map[string][]byte{"full" + parent: full, "short" + parent: short} {
			if got := apply(t, plain, name, "base", data); got != size {
				t.Errorf("%s: a layer of %d bytes", name, got)
			}
			copied, err := os.ReadFile(filepath.Join(home, name, "diff", "holes"))
			must(t, err)
			if len(copied) != size || !bytes.Equal(copied[size/2-4:size/2+8], []byte("\x00\x00\x00\x00data\x00\x00\x00\x00")) {
				t.Errorf("%s: wrong content of %d bytes", name, len(copied))
			}
		}
	}
}
