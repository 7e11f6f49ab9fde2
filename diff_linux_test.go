package overlay2

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// makeTar returns a tar of headers; a header's Xattrs "content" record is its body.
func makeTar(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.body))
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(h.Name, "/") {
				h.Typeflag, h.Mode = tar.TypeDir, 0o755
			}
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1e9, 0)
		}
		must(t, w.WriteHeader(&h))
		_, err := io.WriteString(w, e.body)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

type tarEntry struct {
	tar.Header
	body string
}

// file is an entry of a tar: a file, or a directory if the name ends in a slash.
func file(name, body string) tarEntry { return tarEntry{tar.Header{Name: name}, body} }

// apply makes the layer id on parent from a tar.
func apply(t testing.TB, d *Driver, id, parent string, data []byte) int64 {
	t.Helper()
	must(t, d.Create(id, parent, nil))
	size, err := d.ApplyDiff(id, parent, bytes.NewReader(data))
	must(t, err)
	return size
}

// readDiff returns the whole Diff.
func readDiff(t testing.TB, d *Driver, id, parent string) []byte {
	t.Helper()
	r, err := d.Diff(id, parent)
	must(t, err)
	data, err := io.ReadAll(r)
	must(t, errors.Join(err, r.Close()))
	return data
}

// tarNames lists the names in a tar.
func tarNames(t testing.TB, data []byte) []string {
	t.Helper()
	var names []string
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return names
		}
		must(t, err)
		names = append(names, h.Name)
	}
}

const baseText = `
file etc/passwd "root:x:0:0\n"
file etc/shadow 0600 gid=42 "root:*\n"
file usr/bin/tool 0755 size=300K
file usr/bin/su 04755 "su"
symlink bin -> usr/bin
link usr/bin/alias -> usr/bin/tool
dir tmp 01777
dir var/empty 0700 uid=7 gid=8
dir var/lib/a
file var/lib/a/1 "1" user.note="kept"
file var/lib/a/2 "2"
file var/lib/b/3 "3"
char dev/null 0666 1:3
fifo run/pipe 0600
`

// TestDifferential is the main promise: whatever is done in a mounted layer, a plain directory
// ends the same; Diff and ApplyDiff on the same parent give the same tree again, by the
// same bytes; and Changes tells what comparing both trees tells.
func TestDifferential(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		for seed := range uint64(3) {
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				options := [][]string{nil, {"redirect_dir=on"}, {"metacopy=on", "redirect_dir=on"}}[seed]
				differential(t, filepath.Join(dir, fmt.Sprint(seed)), options, rand.New(rand.NewPCG(seed, 2)))
			})
		}
	})
}

func differential(t *testing.T, dir string, options []string, r *rand.Rand) {
	d := newTestDriver(t, dir+"/home", Options{MountOptions: options})
	must(t, d.Create("base", "", nil))
	fill(t, d, "base", baseText)
	must(t, d.Create("mid", "base", nil))
	midPath, put := get(t, d, "mid")
	overlaytest.Random(t, r, midPath, 100, overlaytest.OddNames)
	put()
	must(t, d.CreateReadWrite("box", "mid", nil))
	path, put := get(t, d, "box")
	plain := dir + "/plain"
	start := readDiff(t, d, "mid", "")
	must(t, os.Mkdir(plain, 0o755))
	_, err := archive.Unpack(t.Context(), plain, bytes.NewReader(start), archive.UnpackOptions{Format: archive.Merged})
	must(t, err)
	overlaytest.Compare(t, overlaytest.Tree(t, plain, overlaytest.NoRootTime), overlaytest.Tree(t, path, overlaytest.NoRootTime))
	ops := overlaytest.Random(t, r, path, 200, overlaytest.OddNames)
	overlaytest.Apply(t, plain, ops)
	put()

	want := tree(t, d, "box", overlaytest.NoRootTime)
	overlaytest.Compare(t, overlaytest.Tree(t, plain, overlaytest.NoRootTime), want)
	for name, parent := range map[string]string{"native": "mid", "merged": "base"} {
		diff := readDiff(t, d, "box", parent)
		if again := readDiff(t, d, "box", parent); !bytes.Equal(diff, again) {
			t.Errorf("%s: the same layer gives different bytes", name)
		}
		size := apply(t, d, "copy-"+name, parent, diff)
		if got, err := d.DiffSize("copy-"+name, parent); err != nil || got != size {
			t.Errorf("%s: apply says %d bytes, DiffSize %d, %v", name, size, got, err)
		}
		overlaytest.Compare(t, want, tree(t, d, "copy-"+name, overlaytest.NoRootTime))
	}
	if got := readDiff(t, d, "copy-native", "mid"); !bytes.Equal(got, readDiff(t, d, "box", "mid")) && len(options) == 0 {
		overlaytest.Compare(t, strings.Join(tarNames(t, readDiff(t, d, "box", "mid")), "\n"), strings.Join(tarNames(t, got), "\n"))
	}
	wantSameChanges(t, d, "box", "mid")
	wantSameChanges(t, d, "mid", "base")
}

// wantSameChanges compares Changes with what the mounted trees show.
func wantSameChanges(t *testing.T, d *Driver, id, parent string) {
	t.Helper()
	native, err := d.Changes(id, parent)
	must(t, err)
	newPath, put := get(t, d, id)
	defer put()
	oldPath, put2 := get(t, d, parent)
	defer put2()
	merged, err := archive.Compare(t.Context(), newPath, oldPath)
	must(t, err)
	overlaytest.Compare(t, changesText(merged), changesText(native))
}

func changesText(changes []archive.Change) string {
	var b strings.Builder
	for _, c := range changes {
		fmt.Fprintf(&b, "%v %q\n", c.Kind, c.Path)
	}
	return b.String()
}

func TestApplyDiff(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		d := newTestDriver(t, dir, Options{})
		size := apply(t, d, "base", "", makeTar(t, file("a", "12345"), file("dir/", ""), file("dir/b", "1"),
			tarEntry{tar.Header{Name: "dir/link", Typeflag: tar.TypeLink, Linkname: "a"}, ""},
			tarEntry{tar.Header{Name: "sym", Typeflag: tar.TypeSymlink, Linkname: "abc"}, ""}))
		if size != 9 {
			t.Errorf("base has %d bytes, want 9", size)
		}
		apply(t, d, "top", "base", makeTar(t, file(".wh.a", ""), file("dir/.wh..wh..opq", ""), file("dir/c", "c")))
		changes, err := d.Changes("top", "base")
		must(t, err)
		want := "D \"/a\"\nC \"/dir\"\nD \"/dir/b\"\nA \"/dir/c\"\nD \"/dir/link\"\n"
		overlaytest.Compare(t, want, changesText(changes))
		wantSameChanges(t, d, "top", "base")
		must(t, d.CreateReadWrite("box", "top", nil))
		overlaytest.Compare(t, "\".\" dir\n\"dir\" dir\n\"dir/c\" file\n\"sym\" symlink\n", firstWords(tree(t, d, "box"), 2))
	})
}

// TestApplyAgainSize: ApplyDiff to a layer that has content already returns the size of all it has then.
func TestApplyAgainSize(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	d := newTestDriver(t, t.TempDir(), Options{})
	apply(t, d, "base", "", makeTar(t, file("one", "0123456789")))
	must(t, d.Create("top", "base", nil))
	for i, want := range []int64{5, 5, 12} {
		diff := makeTar(t, file([]string{"two", "two", "three"}[i], []string{"01234", "43210", "0123456"}[i]))
		got, err := d.ApplyDiff("top", "base", bytes.NewReader(diff))
		must(t, err)
		if size, err := d.DiffSize("top", "base"); err != nil || got != want || size != want {
			t.Errorf("time %d: %d bytes, DiffSize %d, want %d, %v", i, got, size, want, err)
		}
	}
}

// oneByteReader gives the stream a byte at a time, and counts what is left.
type oneByteReader struct{ r *bytes.Reader }

func (r oneByteReader) Read(p []byte) (int, error) { return r.r.Read(p[:min(1, len(p))]) }

// TestApplyDiffReadsToEnd: what follows the end of the archive is read too.
func TestApplyDiffReadsToEnd(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	r := bytes.NewReader(append(makeTar(t, file("a", "x")), make([]byte, 20000)...))
	must(t, d.Create("a", "", nil))
	_, err := d.ApplyDiff("a", "", oneByteReader{r})
	must(t, err)
	if r.Len() > 0 {
		t.Errorf("%d bytes not read", r.Len())
	}
}

// TestIncomplete: a layer whose apply did not end well is never taken for whole.
func TestIncomplete(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	apply(t, d, "base", "", makeTar(t, file("a", "x")))
	good := makeTar(t, file("b", "y"), file("c", strings.Repeat("z", 3000)))
	must(t, d.Create("top", "base", nil))
	wantErr(t, errOf(d.ApplyDiff("top", "base", bytes.NewReader(good[:2000]))), io.ErrUnexpectedEOF)
	next := openTestDriver(t, d.home, Options{}) // as after a crash
	for _, d := range []*Driver{d, next} {
		_, err := d.Get("top", "")
		wantErr(t, err, ErrIncomplete)
		wantErr(t, d.Create("child", "top", nil), ErrIncomplete)
		_, err = d.Diff("top", "base")
		wantErr(t, err, ErrIncomplete)
		_, err = d.DiffSize("top", "base")
		wantErr(t, err, ErrIncomplete)
		_, err = d.Changes("top", "base")
		wantErr(t, err, ErrIncomplete)
		problems, err := d.Check()
		if err != nil || len(problems) != 1 || problems[0].ID != "top" || !errors.Is(problems[0].Err, ErrIncomplete) {
			t.Errorf("check: %v %v", problems, err)
		}
	}
	// Applied again: nothing of the first try stays.
	other := makeTar(t, file("d", "w"))
	_, err := d.ApplyDiff("top", "base", bytes.NewReader(other))
	must(t, err)
	overlaytest.Compare(t, "\".\" dir\n\"a\" file\n\"d\" file\n", firstWords(tree(t, d, "top"), 2))
	// Or removed.
	must(t, d.Create("top2", "base", nil))
	wantErr(t, errOf(d.ApplyDiff("top2", "base", bytes.NewReader(good[:600]))), io.ErrUnexpectedEOF)
	must(t, d.Remove("top2"))
}

func errOf(_ int64, err error) error { return err }

// TestIncompleteKeepsContent: a failed apply to a layer that was written before does not cost what was there.
func TestIncompleteKeepsContent(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.CreateReadWrite("box", "", nil))
	fill(t, d, "box", `file precious "data"`)
	wantErr(t, errOf(d.ApplyDiff("box", "", strings.NewReader("no tar at all"))), archive.ErrFormat)
	_, err := d.ApplyDiff("box", "", bytes.NewReader(makeTar(t, file("new", "x"))))
	must(t, err)
	overlaytest.Compare(t, "\".\" dir\n\"new\" file\n\"precious\" file\n", firstWords(tree(t, d, "box"), 2))
}

// TestApplyErrors: the error names the layer and the entry.
func TestApplyErrors(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("a", "", nil))
	err := errOf(d.ApplyDiff("a", "", bytes.NewReader(makeTar(t, file("fine", "x"), file("dir/.wh..", "")))))
	wantErr(t, err, archive.ErrInvalidWhiteout)
	var e *archive.EntryError
	if !errors.As(err, &e) || e.Name != "dir/.wh.." || !strings.HasPrefix(err.Error(), "apply a: ") {
		t.Errorf("got %v", err)
	}
	must(t, d.Remove("a"))
	wantErr(t, errOf(d.ApplyDiff("none", "", bytes.NewReader(nil))), ErrLayerNotFound)
	must(t, d.Create("b", "", nil))
	wantErr(t, errOf(d.ApplyDiff("b", "none", bytes.NewReader(nil))), ErrLayerNotFound)
	must(t, d.Create("c", "b", nil))
	wantErr(t, errOf(d.ApplyDiff("b", "", bytes.NewReader(makeTar(t, file("x", ""))))), ErrLayerInUse)
	failing := io.MultiReader(bytes.NewReader(makeTar(t, file("x", "y"))[:700]), failingReader{})
	wantErr(t, errOf(d.ApplyDiff("c", "b", failing)), errBroken)
	must(t, d.Remove("c"))
}

var errBroken = errors.New("connection broken")

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errBroken }

// TestApplyMerged: a diff against another layer than the parent, or to a mounted layer,
// is applied through the mount, with the same result.
func TestApplyMerged(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	apply(t, d, "base", "", makeTar(t, file("keep", "1"), file("gone", "2"), file("dir/", ""), file("dir/old", "3")))
	apply(t, d, "mid", "base", makeTar(t, file("mid", "4")))
	diff := makeTar(t, file(".wh.gone", ""), file("dir/.wh..wh..opq", ""), file("dir/new", "5"))
	must(t, d.Create("direct", "mid", nil))
	_, err := d.ApplyDiff("direct", "mid", bytes.NewReader(diff))
	must(t, err)
	want := firstWords(tree(t, d, "direct"), 2)

	must(t, d.Create("other", "mid", nil))
	size, err := d.ApplyDiff("other", "base", bytes.NewReader(diff))
	must(t, err)
	overlaytest.Compare(t, want, firstWords(tree(t, d, "other"), 2))
	if got, err := d.DiffSize("other", "mid"); err != nil || got != size || got != 1 {
		t.Errorf("size %d, DiffSize %d, %v", size, got, err)
	}

	must(t, d.CreateReadWrite("mounted", "mid", nil))
	path, put := get(t, d, "mounted")
	_, err = d.ApplyDiff("mounted", "mid", bytes.NewReader(diff))
	must(t, err)
	if _, err := os.Stat(path + "/dir/new"); err != nil {
		t.Errorf("not seen in the mount: %v", err)
	}
	put()
	overlaytest.Compare(t, want, firstWords(tree(t, d, "mounted"), 2))
}

// TestDiffAnyPair: Diff works between any two layers, and applies on the second.
func TestDiffAnyPair(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		d := newTestDriver(t, dir, Options{})
		must(t, d.Create("a", "", nil))
		fill(t, d, "a", baseText)
		r := rand.New(rand.NewPCG(3, 3))
		for _, l := range [][2]string{{"b", "a"}, {"c", "b"}, {"x", "a"}} {
			must(t, d.CreateReadWrite(l[0], l[1], nil))
			path, put := get(t, d, l[0])
			overlaytest.Random(t, r, path, 60)
			put()
		}
		must(t, d.Create("alone", "", nil))
		fill(t, d, "alone", "file etc \"now a file\"\nfile z \"z\"")
		for _, pair := range [][2]string{{"c", "a"}, {"c", "x"}, {"x", "c"}, {"c", "alone"}, {"alone", "c"}, {"c", ""}, {"a", "c"}, {"c", "c"}} {
			id, parent := pair[0], pair[1]
			diff := readDiff(t, d, id, parent)
			if parent == "" {
				for _, name := range tarNames(t, diff) {
					if strings.Contains(name, ".wh.") {
						t.Errorf("a mark in a whole tree: %s", name)
					}
				}
			}
			apply(t, d, "copy", parent, diff)
			overlaytest.Compare(t, tree(t, d, id, overlaytest.NoRootTime), tree(t, d, "copy", overlaytest.NoRootTime))
			if size, err := d.DiffSize(id, parent); err != nil || size < 0 {
				t.Errorf("%q: size %d %v", pair, size, err)
			}
			must(t, d.Remove("copy"))
			if t.Failed() {
				t.Fatalf("pair %q", pair)
			}
		}
		if changes, err := d.Changes("c", "c"); err != nil || len(changes) > 0 {
			t.Errorf("a layer differs from itself: %v %v", changes, err)
		}
		if _, err := d.Diff("c", "none"); !errors.Is(err, ErrLayerNotFound) {
			t.Errorf("unknown parent: %v", err)
		}
	})
}

// TestDiffClose: a stream can be closed at any time; until then the layer stays.
func TestDiffClose(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	apply(t, d, "a", "", makeTar(t, file("big", strings.Repeat("x", 1<<20)), file("z", "")))
	apply(t, d, "b", "", makeTar(t, file("y", "")))
	for _, pair := range [][2]string{{"a", ""}, {"a", "b"}} {
		r, err := d.Diff(pair[0], pair[1])
		must(t, err)
		_, err = io.ReadFull(r, make([]byte, 10))
		must(t, err)
		wantErr(t, d.Remove("a"), ErrLayerInUse)
		must(t, r.Close())
		must(t, r.Close())
		if _, err := r.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("read after close: %v", err)
		}
	}
	r, err := d.Diff("a", "")
	must(t, err)
	var b bytes.Buffer
	n, err := r.(io.WriterTo).WriteTo(&b)
	must(t, errors.Join(err, r.Close()))
	if n != int64(b.Len()) || !bytes.Equal(b.Bytes(), readDiff(t, d, "a", "")) {
		t.Error("WriteTo and Read differ")
	}
	must(t, d.Remove("a"))
}

// TestDiffWhileMounted: as docker commit does it.
func TestDiffWhileMounted(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	apply(t, d, "base", "", makeTar(t, file("a", "1")))
	must(t, d.CreateReadWrite("box", "base", nil))
	path, put := get(t, d, "box")
	must(t, os.WriteFile(path+"/b", []byte("2"), 0o600))
	must(t, os.Remove(path+"/a"))
	if got := tarNames(t, readDiff(t, d, "box", "base")); !slices.Equal(got, []string{".wh.a", "b"}) {
		t.Errorf("diff of a mounted layer: %q", got)
	}
	put()
}

// TestDiffMissing: in peers a missing diff directory gives a valid empty tar.
func TestDiffMissing(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	d, err := New(t.TempDir(), Options{})
	must(t, err)
	apply(t, d, "a", "", makeTar(t, file("f", "x")))
	must(t, os.RemoveAll(d.home+"/a/diff"))
	_, err = d.Diff("a", "")
	wantErr(t, err, ErrCorrupt)
	_, err = d.DiffSize("a", "")
	wantErr(t, err, ErrCorrupt)
	must(t, d.Cleanup())
}

// TestDiffUnmapped: in peers files whose owners the id map does not cover are left out.
func TestDiffUnmapped(t *testing.T) {
	ids := []archive.IDRange{{ContainerID: 0, HostID: 100000, Size: 1000}}
	d := newTestDriver(t, t.TempDir(), Options{IDMap: archive.IDMap{UIDs: ids, GIDs: ids}})
	apply(t, d, "a", "", makeTar(t, tarEntry{tar.Header{Name: "f", Uid: 5, Gid: 6}, "x"}))
	var st unix.Stat_t
	must(t, unix.Lstat(d.home+"/a/diff/f", &st))
	if st.Uid != 100005 || st.Gid != 100006 {
		t.Errorf("owner %d:%d", st.Uid, st.Gid)
	}
	h, err := tar.NewReader(bytes.NewReader(readDiff(t, d, "a", ""))).Next()
	must(t, err)
	if h.Uid != 5 || h.Gid != 6 {
		t.Errorf("diff gives owner %d:%d", h.Uid, h.Gid)
	}
	must(t, os.Chown(d.home+"/a/diff/f", 5, 6))
	r, err := d.Diff("a", "")
	must(t, err)
	_, err = io.Copy(io.Discard, r)
	wantErr(t, err, archive.ErrUnmapped)
	must(t, r.Close())
	must(t, d.Remove("a"))
}

// TestRootOpaque: overlayfs ignores the mark on an upper root; all below must be hidden all the same.
func TestRootOpaque(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	apply(t, d, "base", "", makeTar(t, file("a", "1"), file("dir/", ""), file("dir/b", "2"), file("dir2/", ""), file("dir2/c", "")))
	apply(t, d, "top", "base", makeTar(t, file("dir/", ""), file("dir/x", "3"), file(".wh..wh..opq", ""), file("new", "4")))
	overlaytest.Compare(t, "\".\" dir\n\"dir\" dir\n\"dir/x\" file\n\"new\" file\n", firstWords(tree(t, d, "top"), 2))
	apply(t, d, "copy", "base", readDiff(t, d, "top", "base"))
	overlaytest.Compare(t, tree(t, d, "top", overlaytest.NoRootTime), tree(t, d, "copy", overlaytest.NoRootTime))
	wantSameChanges(t, d, "top", "base")
}

// TestRootMetadata: a layer that says nothing of "/" leaves its mode and owner as they are below.
func TestRootMetadata(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	apply(t, d, "base", "", makeTar(t, tarEntry{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 3, Gid: 4}, ""}))
	apply(t, d, "top", "base", makeTar(t, file("f", "x")))
	if got := firstWords(tree(t, d, "top"), 4); !strings.HasPrefix(got, `"." dir 0700 3:4`) {
		t.Errorf("got\n%s", got)
	}
	if got := tarNames(t, readDiff(t, d, "top", "base")); !slices.Equal(got, []string{"f"}) {
		t.Errorf("diff %q", got)
	}
	if got := tarNames(t, readDiff(t, d, "base", "")); !slices.Equal(got, []string{"./"}) {
		t.Errorf("diff of the base %q", got)
	}
	// Between layers that are not parent and child too.
	apply(t, d, "other", "", makeTar(t, file("f", "x")))
	if got := tarNames(t, readDiff(t, d, "top", "other")); !slices.Equal(got, []string{"./"}) {
		t.Errorf("diff to another layer %q", got)
	}
}

// TestWhiteoutName: a file that is really named .wh.x must not become a deletion of x.
func TestWhiteoutName(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	apply(t, d, "base", "", makeTar(t, file("x", "1")))
	must(t, d.CreateReadWrite("box", "base", nil))
	fill(t, d, "box", `file .wh.x "not a mark"`)
	r, err := d.Diff("box", "base")
	must(t, err)
	_, err = io.Copy(io.Discard, r)
	wantErr(t, err, archive.ErrInvalidWhiteout)
	must(t, r.Close())
}

// TestDiffSizeKnown: the size of a layer that nobody can write is known after it was asked for once; one
// that can be written is counted anew, and so is another layer of the same ID.
func TestDiffSizeKnown(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	size := func(id, parent string, want int64) {
		t.Helper()
		if got, err := d.DiffSize(id, parent); err != nil || got != want {
			t.Errorf("%s has %d bytes, want %d, %v", id, got, want, err)
		}
	}
	apply(t, d, "base", "", makeTar(t, file("a", "12345")))
	size("base", "", 5)
	fill(t, d, "base", `file b "123"`)
	size("base", "", 8)
	must(t, d.Create("top", "base", nil))
	time.Sleep(2 * settleTime)
	size("base", "", 8)
	size("base", "", 8)
	n := 0
	d.sizes.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d sizes are remembered", n)
	}
	must(t, d.Remove("top"))
	must(t, errOf(d.ApplyDiff("base", "", bytes.NewReader(makeTar(t, file("c", "1234"))))))
	size("base", "", 12)
	time.Sleep(2 * settleTime)
	size("base", "", 12)
	other := openTestDriver(t, d.home, Options{}) // as another process
	must(t, errOf(other.ApplyDiff("base", "", bytes.NewReader(makeTar(t, file("a", ""))))))
	size("base", "", 7)
	must(t, d.Remove("base"))
	apply(t, d, "base", "", makeTar(t, file("a", "1")))
	must(t, d.Create("top", "base", nil))
	size("base", "", 1)
}
