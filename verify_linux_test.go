package overlay2

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// differences returns what Verify reports.
func differences(t *testing.T, d *Driver, id string) string {
	t.Helper()
	var all []string
	if err := d.Verify(t.Context(), id, func(diff Difference) { all = append(all, diff.String()) }); err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, "; ")
}

func verifyTar(t *testing.T) []byte {
	return makeTar(t, file("dir/", ""), file("dir.a", "between"), file("dir/a", "content"), file("dir/b", "b"), file("dir/.hidden", "h"),
		tarEntry{tar.Header{Name: "dir/link", Typeflag: tar.TypeSymlink, Linkname: "a"}, ""},
		tarEntry{tar.Header{Name: "dir/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, ""},
		tarEntry{tar.Header{Name: "dir/x", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "1"}}, "x"},
		file("low/", ""), file("low/.wh.gone", ""), file("opaque/", ""), file("opaque/.wh..wh..opq", ""), file("opaque/own", "o"))
}

// TestVerify: each change of a file is reported, by its path and what it is, and nothing else.
func TestVerify(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	keep := func(path string, f func() error) error {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if err := f(); err != nil {
			return err
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
	}
	for name, c := range map[string]struct {
		change func(dir string) error
		want   string
	}{
		"nothing": {func(string) error { return nil }, ""},
		"bit": {func(dir string) error {
			return keep(dir+"/dir/a", func() error { return os.WriteFile(dir+"/dir/a", []byte("contenT"), 0) })
		}, "dir/a: content"},
		"longer": {func(dir string) error {
			return keep(dir+"/dir/a", func() error { return os.WriteFile(dir+"/dir/a", []byte("content+"), 0) })
		}, "dir/a: size, content"},
		"mode":       {func(dir string) error { return os.Chmod(dir+"/dir/a", 0o600) }, "dir/a: mode"},
		"setuid":     {func(dir string) error { return os.Chmod(dir+"/dir/b", 0o644|fs.ModeSetuid) }, "dir/b: mode"},
		"owner":      {func(dir string) error { return os.Lchown(dir+"/dir/link", 1, 2) }, "dir/link: owner"},
		"time":       {func(dir string) error { return os.Chtimes(dir+"/dir/b", time.Time{}, time.Unix(5, 7)) }, "dir/b: time"},
		"xattr":      {func(dir string) error { return unix.Setxattr(dir+"/dir/x", "user.a", []byte("2"), 0) }, "dir/x: xattrs"},
		"xattr gone": {func(dir string) error { return unix.Removexattr(dir+"/dir/x", "user.a") }, "dir/x: xattrs"},
		"target": {func(dir string) error {
			return keep(dir+"/dir", func() error {
				return keep(dir+"/dir/link", func() error {
					return errors.Join(os.Remove(dir+"/dir/link"), os.Symlink("b", dir+"/dir/link"))
				})
			})
		}, "dir/link: target"},
		"device": {func(dir string) error {
			return keep(dir+"/dir", func() error {
				return keep(dir+"/dir/null", func() error {
					return errors.Join(os.Remove(dir+"/dir/null"), unix.Mknod(dir+"/dir/null", unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))))
				})
			})
		}, "dir/null: device"},
		"type": {func(dir string) error {
			return keep(dir+"/dir", func() error { return errors.Join(os.Remove(dir+"/dir/b"), os.Mkdir(dir+"/dir/b", 0o755)) })
		}, "dir/b: type"},
		"missing": {func(dir string) error { return keep(dir+"/dir", func() error { return os.Remove(dir + "/dir/a") }) }, "dir/a: missing"},
		"tree missing": {func(dir string) error { return os.RemoveAll(dir + "/dir") },
			"dir: missing; dir/.hidden: missing; dir/a: missing; dir/b: missing; dir/link: missing; dir/null: missing; dir/x: missing"},
		"extra": {func(dir string) error {
			return keep(dir+"/dir", func() error { return os.WriteFile(dir+"/dir/aa", nil, 0o600) })
		}, "dir/aa: extra"},
		"last missing, first extra": {func(dir string) error {
			return errors.Join(os.RemoveAll(dir+"/opaque"), os.WriteFile(dir+"/0", nil, 0o600))
		},
			"0: extra; opaque: missing; opaque/.wh..wh..opq: missing; opaque/own: missing"},
		"whiteout gone": {func(dir string) error { return keep(dir+"/low", func() error { return os.Remove(dir + "/low/gone") }) }, "low/.wh.gone: missing"},
		"file for a whiteout": {func(dir string) error {
			return keep(dir+"/low", func() error {
				return errors.Join(os.Remove(dir+"/low/gone"), keep(dir+"/low", func() error { return os.WriteFile(dir+"/low/gone", nil, 0o644) }))
			})
		}, "low/gone: type"},
		"not opaque": {func(dir string) error { return unix.Removexattr(dir+"/opaque", "trusted.overlay.opaque") }, "opaque/.wh..wh..opq: missing"},
		"root":       {func(dir string) error { return os.Chmod(dir, 0o700) }, ".: mode"},
	} {
		t.Run(name, func(t *testing.T) {
			overlaytest.NoLeaks(t)
			dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
			d := newTestDriver(t, dir+"/home", Options{RecordDigests: true})
			apply(t, d, "base", "", makeTar(t, file("low/", ""), file("low/gone", "g"), file("opaque/", ""), file("opaque/hidden", "h")))
			apply(t, d, "top", "base", verifyTar(t))
			must(t, c.change(d.home+"/top/diff"))
			if got := differences(t, d, "top"); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			// What becomes of a layer below is no matter of this one.
			must(t, os.RemoveAll(d.home+"/base/diff/low"))
			must(t, os.RemoveAll(d.home+"/base/diff/opaque"))
			must(t, os.Chmod(d.home+"/base/diff", 0o711))
			if got := differences(t, d, "base"); got != ".: mode; low: missing; low/gone: missing; opaque: missing; opaque/hidden: missing" {
				t.Errorf("base: %s", got)
			}
			if got := differences(t, d, "top"); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// TestVerifyLife: what the library and the kernel do with a layer is no difference; an apply replaces or drops the digests.
func TestVerifyLife(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		d := newTestDriver(t, dir+"/home", Options{})
		record := openTestDriver(t, dir+"/home", Options{RecordDigests: true})
		must(t, record.applyAll(t))
		for _, id := range []string{"one", "two"} {
			if got := differences(t, d, id); got != "" {
				t.Errorf("%s: %s", id, got)
			}
		}
		wantErr(t, d.Verify(t.Context(), "none", nil), ErrLayerNotFound)
		wantErr(t, d.RecordDigests(t.Context(), "none"), ErrLayerNotFound)
		must(t, d.CreateReadWrite("box", "two", nil))
		wantErr(t, d.Verify(t.Context(), "box", nil), ErrNoDigests)
		path, put := get(t, d, "box")
		wantErr(t, d.RecordDigests(t.Context(), "box"), ErrLayerInUse)
		overlaytest.Random(t, rand.New(rand.NewPCG(1, 2)), path, 200)
		put()
		must(t, d.RecordDigests(t.Context(), "box"))
		if got := differences(t, d, "box"); got != "" {
			t.Errorf("box: %s", got)
		}
		// Mounted and read in any way it stays as it was.
		_ = tree(t, d, "box")
		_ = readDiff(t, d, "box", "two")
		fill(t, d, "box", "")
		if got := differences(t, d, "box"); got != "" {
			t.Errorf("box: %s", got)
		}
		must(t, errOf(d.ApplyDiff("box", "two", bytes.NewReader(makeTar(t, file("more", "m"))))))
		wantErr(t, d.Verify(t.Context(), "box", nil), ErrNoDigests)
		must(t, errOf(record.ApplyDiff("box", "two", bytes.NewReader(makeTar(t, file("more", "n"))))))
		if got := differences(t, d, "box"); got != "" {
			t.Errorf("box: %s", got)
		}
		// What is written through the mount is told, and no more.
		apply(t, record, "new", "two", makeTar(t, file("dir/", ""), file("dir/more", "m")))
		path, put = get(t, d, "new")
		must(t, os.WriteFile(path+"/dir/more", []byte("N"), 0o644))
		must(t, os.Chmod(path+"/dir/x", 0o600)) // of a layer below: copied up
		must(t, os.Remove(path+"/dir/a"))
		put()
		if got, want := differences(t, d, "new"), "dir: time; dir/.wh.a: extra; dir/more: time, content; dir/x: extra"; got != want {
			t.Errorf("new: %s\nwant %s", got, want)
		}
		// Filled through a mount, as a layer is that somebody has got.
		_, put = get(t, record, "box")
		must(t, errOf(record.ApplyDiff("box", "two", bytes.NewReader(makeTar(t, file("more", "o"), file("dir/.wh.a", ""))))))
		if got := differences(t, d, "box"); got != "" {
			t.Errorf("box: %s", got)
		}
		put()
		if got := differences(t, d, "box"); got != "" {
			t.Errorf("box: %s", got)
		}
		must(t, os.Symlink("content", d.home+"/box/incomplete"))
		wantErr(t, d.Verify(t.Context(), "box", nil), ErrIncomplete)
		wantErr(t, d.RecordDigests(t.Context(), "box"), ErrIncomplete)
		must(t, os.Remove(d.home+"/box/incomplete"))
	})
}

// TestVerifyEnds: a call that is cancelled says so, and leaves what was recorded before and nothing else.
func TestVerifyEnds(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{RecordDigests: true})
	apply(t, d, "base", "", makeTar(t, file("a", strings.Repeat("a", 5_000_000)), file("b", "b")))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantErr(t, d.Verify(ctx, "base", func(diff Difference) { t.Error(diff) }), context.Canceled)
	wantErr(t, d.RecordDigests(ctx, "base"), context.Canceled)
	if got := differences(t, d, "base"); got != "" {
		t.Errorf("%s", got)
	}
	entries, err := os.ReadDir(d.home + "/base")
	must(t, err)
	if fmt.Sprint(entries) != "[d diff/ - digests - link L listed]" {
		t.Errorf("%v", entries)
	}
	// While it is read it stays, for others to read too.
	must(t, os.WriteFile(d.home+"/base/diff/b", []byte("c"), 0o644))
	must(t, d.Verify(t.Context(), "base", func(diff Difference) {
		wantErr(t, d.Remove("base"), ErrLayerInUse)
		if got := differences(t, d, "base"); got != diff.String() {
			t.Errorf("within: %s, not %v", got, diff)
		}
	}))
}

// sparseTar is the tar of a layer with one sparse file of each size, all hole, as SparseDiffs writes it.
func sparseTar(t *testing.T, sizes ...int64) []byte {
	t.Helper()
	d := newTestDriver(t, t.TempDir(), Options{SparseDiffs: true})
	must(t, d.CreateReadWrite("box", "", nil))
	path, put := get(t, d, "box")
	for i, size := range sizes {
		name := fmt.Sprintf("%s/%d", path, i)
		must(t, os.WriteFile(name, nil, 0o600))
		must(t, os.Truncate(name, size))
	}
	put()
	return readDiff(t, d, "box", "")
}

// TestVerifyHoles: a small tar with large holes does not keep ApplyDiff: beyond a limit no digests are recorded.
// RecordDigests takes what it takes, as Verify does, and both can be ended.
func TestVerifyHoles(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	var logged bytes.Buffer
	log := logrus.New()
	log.SetOutput(&logged)
	d := newTestDriver(t, t.TempDir(), Options{RecordDigests: true, Log: logrus.NewEntry(log)})
	d.maxHoles = 3 << 20
	apply(t, d, "some", "", sparseTar(t, 1<<20, 2<<20))
	if got := differences(t, d, "some"); got != "" {
		t.Error(got)
	}
	apply(t, d, "many", "", sparseTar(t, 1<<20, 1<<20, 1<<20, 100<<10))
	wantErr(t, d.Verify(t.Context(), "many", func(Difference) {}), ErrNoDigests)
	if got := logged.String(); strings.Count(got, "no digests recorded") != 1 || !strings.Contains(got, "layer=many") {
		t.Errorf("logged: %s", got)
	}
	must(t, d.RecordDigests(t.Context(), "many"))
	if got := differences(t, d, "many"); got != "" {
		t.Error(got)
	}
	huge := sparseTar(t, 1<<40)
	apply(t, d, "huge", "", huge)
	must(t, errOf3(d.ApplyLayers("", []LayerDiff{{"parallel", bytes.NewReader(huge)}})))
	for _, id := range []string{"huge", "parallel"} {
		wantErr(t, d.Verify(t.Context(), id, func(Difference) {}), ErrNoDigests)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		wantErr(t, d.RecordDigests(ctx, id), context.DeadlineExceeded)
		cancel()
		entries, err := os.ReadDir(d.home + "/" + id)
		must(t, err)
		if fmt.Sprint(entries) != "[d diff/ - link L listed]" {
			t.Errorf("%v", entries)
		}
	}
}

// TestVerifyMany: goroutines that verify, record, mount and read layers do not disturb one another.
func TestVerifyMany(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	d := newTestDriver(t, t.TempDir(), Options{RecordDigests: true})
	other := openTestDriver(t, d.home, Options{})
	must(t, d.applyAll(t))
	var wg sync.WaitGroup
	for i := range 8 {
		d := []*Driver{d, other}[i%2]
		wg.Go(func() {
			for range 10 {
				var err error
				switch i / 2 {
				case 0, 1:
					err = d.Verify(context.Background(), "two", func(diff Difference) { t.Error(diff) })
				case 2:
					err = d.RecordDigests(context.Background(), "one")
				default:
					if err = errOf2(d.Get("one", "")); err == nil {
						err = d.Put("one")
					}
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// applyAll makes two layers at once.
func (d *Driver) applyAll(t *testing.T) error {
	return errOf3(d.ApplyLayers("", []LayerDiff{
		{"one", bytes.NewReader(makeTar(t, file("low/", ""), file("low/gone", "g")))},
		{"two", bytes.NewReader(verifyTar(t))},
	}))
}

func errOf3(_ []int64, err error) error { return err }

// TestVerifyNames: names of any bytes are recorded, sorted as the tar is, and found again.
func TestVerifyNames(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.CreateReadWrite("box", "", nil))
	path, put := get(t, d, "box")
	for i, name := range overlaytest.Names(60) {
		if strings.HasPrefix(name, ".wh.") {
			continue
		}
		must(t, os.MkdirAll(filepath.Join(path, name), 0o755))
		must(t, os.WriteFile(filepath.Join(path, name, fmt.Sprint(i)), []byte(name), 0o644))
	}
	put()
	must(t, d.RecordDigests(t.Context(), "box"))
	if got := differences(t, d, "box"); got != "" {
		t.Errorf("%s", got)
	}
	entries, err := os.ReadDir(path)
	must(t, err)
	for _, e := range entries {
		names, err := os.ReadDir(filepath.Join(path, e.Name()))
		must(t, err)
		from, to := filepath.Join(path, e.Name(), names[0].Name()), filepath.Join(d.home, "kept")
		st, err := os.Stat(filepath.Dir(from))
		must(t, err)
		must(t, os.Rename(from, to))
		must(t, os.Chtimes(filepath.Dir(from), time.Time{}, st.ModTime()))
		want := e.Name() + "/" + names[0].Name() + ": missing"
		if got := differences(t, d, "box"); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		must(t, os.Rename(to, from))
		must(t, os.Chtimes(filepath.Dir(from), time.Time{}, st.ModTime()))
	}
}

// TestVerifyDamaged: digests that are damaged themselves are ErrCorrupt, and report nothing.
func TestVerifyDamaged(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	d := newTestDriver(t, t.TempDir(), Options{RecordDigests: true})
	apply(t, d, "base", "", makeTar(t, file("a", "a"), file("b/", ""), file("b/c", "c")))
	path := d.home + "/base/digests"
	whole, err := os.ReadFile(path)
	must(t, err)
	damaged := func(what string) {
		t.Helper()
		err := d.Verify(t.Context(), "base", func(diff Difference) { t.Errorf("%s: reported %v", what, diff) })
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range whole {
		must(t, os.WriteFile(path, whole[:i], 0o600))
		damaged(fmt.Sprintf("cut at %d", i))
		flipped := bytes.Clone(whole)
		flipped[i] ^= 1
		must(t, os.WriteFile(path, flipped, 0o600))
		damaged(fmt.Sprintf("changed at %d", i))
	}
	for name, text := range map[string][]byte{
		"twice": append(bytes.Clone(whole), whole...), "zeros": make([]byte, 3<<20), "one line": bytes.Repeat([]byte("x"), 3<<20),
		"no end": whole[:bytes.LastIndex(whole, []byte("end "))],
	} {
		must(t, os.WriteFile(path, text, 0o600))
		damaged(name)
	}
	for name, put := range map[string]func(string) error{"fifo": fifo, "dir": directory, "symlink": symlink("/dev/zero"),
		"device": func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) }} {
		replace(t, path, put)
		damaged(name)
	}
	must(t, os.Remove(path))
	must(t, d.RecordDigests(t.Context(), "base"))
	if again, err := os.ReadFile(path); err != nil || !bytes.Equal(again, whole) {
		t.Errorf("recorded again it is another: %v", err)
	}
}
