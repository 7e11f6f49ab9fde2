package overlay2

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// leanTar leaves out of a tar what most builders write and some don't: directories that are only on
// the way to something, and the root.
func leanTar(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	r, w := tar.NewReader(bytes.NewReader(data)), tar.NewWriter(&b)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		if h.Typeflag == tar.TypeDir {
			continue
		}
		must(t, w.WriteHeader(h))
		_, err = io.Copy(w, r)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// slowReader gives little at a time, and takes its time.
type slowReader struct {
	r  io.Reader
	r2 *rand.Rand
}

func (s slowReader) Read(p []byte) (int, error) {
	if s.r2.IntN(4) == 0 {
		time.Sleep(time.Duration(s.r2.IntN(500)) * time.Microsecond)
	}
	return s.r.Read(p[:min(len(p), 1+s.r2.IntN(4096))])
}

// TestApplyLayers fills chains at once and one layer after the other, from tars that say all and from tars
// that leave directories to the layers below: on disk both are the same.
func TestApplyLayers(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		for _, lean := range []bool{false, true} {
			t.Run(fmt.Sprintf("lean=%v", lean), func(t *testing.T) {
				d := newTestDriver(t, filepath.Join(dir, fmt.Sprint(lean)), Options{})
				r := rand.New(rand.NewPCG(5, 8))
				parent := ""
				var tars [][]byte
				for i := range 6 {
					id := fmt.Sprintf("grown-%d", i)
					must(t, d.CreateReadWrite(id, parent, nil))
					root, put := get(t, d, id)
					overlaytest.Random(t, r, root, 120, overlaytest.OddNames)
					put()
					data := readDiff(t, d, id, parent)
					if lean {
						data = leanTar(t, data)
					}
					tars = append(tars, data)
					parent = id
				}
				var layers []LayerDiff
				parent = ""
				for i, data := range tars {
					apply(t, d, fmt.Sprintf("serial-%d", i), parent, data)
					parent = fmt.Sprintf("serial-%d", i)
					layers = append(layers, LayerDiff{
						ID:   fmt.Sprintf("at-once-%d", i),
						Diff: slowReader{bytes.NewReader(data), rand.New(rand.NewPCG(uint64(i), 9))},
					})
				}
				sizes, err := d.ApplyLayers("", layers[:1])
				must(t, err)
				more, err := d.ApplyLayers(layers[0].ID, layers[1:])
				must(t, err)
				sizes = append(sizes, more...)
				for i, l := range layers {
					serial := fmt.Sprintf("serial-%d", i)
					times := overlaytest.NoRootTime
					if lean {
						times = overlaytest.NoTimes // of directories that no diff lists
					}
					overlaytest.Compare(t, tree(t, d, serial, times), tree(t, d, l.ID, times))
					if i == 0 {
						continue
					}
					// The layers alone too: the same whiteouts, the same copied directories.
					before := fmt.Sprintf("serial-%d", i-1)
					want, got := readDiff(t, d, serial, before), readDiff(t, d, l.ID, layers[i-1].ID)
					if !lean && !bytes.Equal(want, got) {
						t.Errorf("layer %d: another diff", i)
					}
					overlaytest.Compare(t, strings.Join(tarNames(t, want), "\n"), strings.Join(tarNames(t, got), "\n"))
					if want, err := d.DiffSize(serial, before); err != nil || sizes[i] != want {
						t.Errorf("layer %d: size %d, want %d, %v", i, sizes[i], want, err)
					}
				}
			})
		}
	})
}

// TestApplyLayersAtOnce has the diff of the lowest layer end only after the others were read whole:
// a layer whose diff says all does not wait for those below.
func TestApplyLayersAtOnce(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	d := newTestDriver(t, filepath.Join(t.TempDir(), "home"), Options{})
	base := makeTar(t, file("etc/", ""), file("etc/passwd", "root"))
	ends := make(chan struct{}, 2)
	gate := readerFunc(func([]byte) (int, error) {
		for range 2 {
			select {
			case <-ends:
			case <-time.After(time.Minute):
				return 0, errors.New("the layers above wait")
			}
		}
		return 0, io.EOF
	})
	atEnd := func(data []byte) io.Reader {
		return io.MultiReader(bytes.NewReader(data), readerFunc(func([]byte) (int, error) { ends <- struct{}{}; return 0, io.EOF }))
	}
	_, err := d.ApplyLayers("", []LayerDiff{
		{"one", io.MultiReader(bytes.NewReader(base), gate)},
		{"two", atEnd(makeTar(t, file("etc/", ""), file("etc/motd", "hello")))},
		{"three", atEnd(makeTar(t, file("srv/", ""), file("srv/data", strings.Repeat("x", 1<<20))))},
	})
	must(t, err)
	changes, err := d.Changes("two", "one")
	must(t, err)
	if got := fmt.Sprint(changes); got != "[C /etc A /etc/motd]" {
		t.Errorf("changes of two are %s", got)
	}
}

// TestApplyLayersWaits has the lowest layer's diff come after the other's was read whole, which needs it:
// for the metadata of a directory, a symlink on the way, and the target of a hard link.
func TestApplyLayersWaits(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	d := newTestDriver(t, filepath.Join(t.TempDir(), "home"), Options{})
	base := makeTar(t,
		tarEntry{Header: tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 5}},
		file("etc/passwd", "root"), file("usr/bin/", ""),
		tarEntry{Header: tar.Header{Name: "bin", Typeflag: tar.TypeSymlink, Linkname: "usr/bin"}},
	)
	upper := makeTar(t,
		file("etc/motd", "hello"), file("bin/tool", "#!"),
		tarEntry{Header: tar.Header{Name: "etc/alias", Typeflag: tar.TypeLink, Linkname: "etc/passwd"}},
	)
	ended := make(chan struct{})
	late := readerFunc(func([]byte) (int, error) { <-ended; return 0, io.EOF })
	_, err := d.ApplyLayers("", []LayerDiff{
		{"one", io.MultiReader(late, bytes.NewReader(base))},
		{"two", io.MultiReader(bytes.NewReader(upper), readerFunc(func([]byte) (int, error) { close(ended); return 0, io.EOF }))},
	})
	must(t, err)
	apply(t, d, "serial", "one", upper)
	want := overlaytest.Tree(t, filepath.Join(d.home, "serial", "diff"), overlaytest.NoRootTime)
	overlaytest.Compare(t, want, overlaytest.Tree(t, filepath.Join(d.home, "two", "diff"), overlaytest.NoRootTime))
	if !strings.Contains(want, `"etc" dir 0700 5:0`) || !strings.Contains(want, `"usr/bin/tool"`) {
		t.Errorf("the test's own tree is %s", want)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestApplyLayersRoot: who says nothing of the root has its parent's, although that came later.
func TestApplyLayersRoot(t *testing.T) {
	d := newTestDriver(t, filepath.Join(t.TempDir(), "home"), Options{})
	root := tarEntry{Header: tar.Header{
		Name: "./", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 7, PAXRecords: map[string]string{"SCHILY.xattr.user.note": "mine"},
	}}
	plain := file("./", "")
	_, err := d.ApplyLayers("", []LayerDiff{
		{"one", slowReader{bytes.NewReader(makeTar(t, root, file("a", "1"))), rand.New(rand.NewPCG(1, 1))}},
		{"two", bytes.NewReader(makeTar(t, file("b", "2")))},
		{"three", bytes.NewReader(makeTar(t, plain))},
		{"four", bytes.NewReader(makeTar(t, file("c", "3")))},
	})
	must(t, err)
	for id, want := range map[string]string{
		"one": `"." dir 0700 7:0 user.note="mine"`, "two": `"." dir 0700 7:0 user.note="mine"`,
		"three": `"." dir 0755 0:0`, "four": `"." dir 0755 0:0`,
	} {
		got, _, _ := strings.Cut(overlaytest.Tree(t, filepath.Join(d.home, id, "diff"), overlaytest.NoTimes), "\n")
		if got != want {
			t.Errorf("%s: root is %s, want %s", id, got, want)
		}
	}
}

// TestApplyLayersFails: the layer that cannot be filled is named, it and those above are gone, those below stay.
func TestApplyLayersFails(t *testing.T) {
	d := newTestDriver(t, filepath.Join(t.TempDir(), "home"), Options{})
	good := makeTar(t, file("etc/", ""), file("etc/passwd", "root"))
	mine := errors.New("mine")
	must(t, d.Create("taken", "", nil))
	for name, c := range map[string]struct {
		bad  io.Reader
		id   string
		want error
		left int
		at   string
	}{
		"reader": {io.MultiReader(bytes.NewReader(good[:700]), iotest.ErrReader(mine)), "c", mine, 2, "c"},
		"cut":    {bytes.NewReader(good[:700]), "c", io.ErrUnexpectedEOF, 2, "c"},
		"taken":  {bytes.NewReader(good), "taken", ErrLayerExists, 0, "taken"},
		"bad id": {bytes.NewReader(good), "../c", ErrInvalidID, 0, "../c"},
	} {
		t.Run(name, func(t *testing.T) {
			layers := []LayerDiff{
				{"a", bytes.NewReader(good)}, {"b", slowReader{bytes.NewReader(good), rand.New(rand.NewPCG(1, 1))}},
				{c.id, c.bad}, {"d", bytes.NewReader(good)},
				// It waits for those below for ever, were it not told.
				{"e", bytes.NewReader(leanTar(t, good))},
			}
			sizes, err := d.ApplyLayers("", layers)
			var le *LayerError
			if !errors.Is(err, c.want) || !errors.As(err, &le) || le.ID != c.at {
				t.Errorf("error %v, want %v of %s", err, c.want, c.at)
			}
			if len(sizes) != c.left {
				t.Errorf("sizes %v, want %d", sizes, c.left)
			}
			for i, l := range layers {
				if l.ID == "taken" {
					continue
				}
				if got := d.Exists(l.ID); got != (i < c.left) {
					t.Errorf("layer %s: exists %v", l.ID, got)
				}
			}
			must(t, d.removeLayers(layers[:c.left]))
		})
	}
	if sizes, err := d.ApplyLayers("", nil); len(sizes) > 0 || err != nil {
		t.Errorf("none: %v, %v", sizes, err)
	}
	must(t, d.Remove("taken"))
}
