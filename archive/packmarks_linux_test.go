package archive

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// packErr packs all of dir and returns the error, which must be an EntryError of name.
func packErr(t *testing.T, dir, name string, opts PackOptions) error {
	t.Helper()
	r, err := Pack(context.Background(), dir, opts)
	if err == nil {
		_, err = io.Copy(io.Discard, r)
		if _, again := r.Read(make([]byte, 1)); err != nil && !errors.Is(again, err) {
			t.Errorf("the error doesn't stay: %v, then %v", err, again)
		}
		must(t, r.Close())
	}
	var e *EntryError
	if !errors.As(err, &e) {
		t.Fatalf("error is %v", err)
	}
	if e.Op != "pack" || e.Name != name {
		t.Errorf("error of %s %q, want pack %q: %v", e.Op, e.Name, name, err)
	}
	return err
}

// The kernel makes whiteouts links of one inode; in a tar each is a file of its own, and always
// the same (moby's has a stale Linkname).
func TestPackWhiteoutsAreNoLinks(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		overlaytest.NoLeaks(t)
		path := func(name string) string { return filepath.Join(dir, name) }
		overlaytest.Build(t, path("low"), "file a\nfile b\nfile c/d\nfile c/e")
		o := overlaytest.Mount(t, []string{path("low")}, path("up"), path("work"), path("m"))
		must(t, os.Remove(path("m/a")))
		must(t, os.Remove(path("m/b")))
		must(t, os.Remove(path("m/c/d")))
		o.Unmount()
		var a, b unix.Stat_t
		must(t, unix.Lstat(path("up/a"), &a))
		must(t, unix.Lstat(path("up/b"), &b))
		if a.Ino == b.Ino && a.Nlink < 3 {
			t.Error("the kernel's whiteouts are no longer shared as this test supposes")
		}
		got := listed(t, packed(t, path("up"), PackOptions{Lowers: []string{path("low")}}))
		want := ".wh.a 0 0 0:0\n.wh.b 0 0 0:0\nc/ 5 755 0:0\nc/.wh.d 0 0 0:0\n"
		if got != want {
			t.Errorf("got:\n%s\nwant:\n%s", got, want)
		}
	})
}

// Table of trees with marks and what becomes of them.
func TestPackMarks(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	for _, c := range []struct{ name, low, up, want string }{
		{
			"whiteout in a new directory hides nothing",
			"file a", "dir d\nwhiteout d/x\nfile d/y", "d/ 5 755 0:0\nd/y 0 644 0:0",
		}, {
			"whiteout in an opaque directory hides nothing",
			"file d/x", "opaque d\nwhiteout d/x\nfile d/y", "d/ 5 755 0:0\nd/.wh..wh..opq 0 0 0:0\nd/y 0 644 0:0",
		}, {
			"whiteout below an opaque directory hides nothing",
			"file d/e/x", "opaque d\ndir d/e\nwhiteout d/e/x", "d/ 5 755 0:0\nd/.wh..wh..opq 0 0 0:0\nd/e/ 5 755 0:0",
		}, {
			"whiteout where the lowers have a file hides nothing",
			"file d", "dir d\nwhiteout d/x", "d/ 5 755 0:0",
		}, {
			"opaque mark of a new directory says nothing",
			"file a", "opaque d\nfile d/y", "d/ 5 755 0:0\nd/y 0 644 0:0",
		}, {
			"without lowers all marks are kept",
			"", "opaque d\nwhiteout d/x\nwhiteout y", "d/ 5 755 0:0\nd/.wh..wh..opq 0 0 0:0\nd/.wh.x 0 0 0:0\n.wh.y 0 0 0:0",
		}, {
			"opaque mark on the root is ignored as overlayfs does",
			"file a", "opaque .\nfile b", "b 0 644 0:0",
		}, {
			"root with another mode",
			"dir . 0755\nfile a", "dir . 0700", "./ 5 700 0:0",
		}, {
			"root with another owner",
			"dir . 0755\nfile a", "dir . 0755 uid=7", "./ 5 755 7:0",
		}, {
			"root with another xattr",
			"dir . 0755 user.a=1\nfile a", "dir . 0755 user.a=2", "./ 5 755 0:0 user.a=\"2\"",
		}, {
			"root as that of the lowers",
			"dir . 0711 uid=7 user.a=1\nfile a", "dir . 0711 uid=7 user.a=1 trusted.overlay.origin=x trusted.overlay.uuid=y", "",
		}, {
			"what overlayfs keeps for itself is no content",
			"file a", "file f trusted.overlay.origin=1 trusted.overlay.impure=y trusted.overlay.nlink=U+1 user.overlay.uuid=2 trusted.overlay.protattr=x user.overlay.x=y trusted.x=1",
			"f 0 644 0:0 trusted.x=\"1\"",
		}, {
			"escaped xattrs lose the escape",
			"file a", "dir d trusted.overlay.overlay.opaque=y user.overlay.overlay.redirect=z",
			"d/ 5 755 0:0 trusted.overlay.opaque=\"y\" user.overlay.redirect=\"z\"",
		}, {
			"security xattrs of the machine are no content",
			"file a", "file f security.other=1 security.capability=\"\\x01\\x00\\x00\\x02\\x00\\x20\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\"",
			"f 0 644 0:0 security.capability=\"\\x01\\x00\\x00\\x02\\x00 \\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\"",
		}, {
			"whiteout that is a file with an xattr",
			"file d/x\nfile d/y\nfile z", "dir d trusted.overlay.opaque=x\nfile d/x trusted.overlay.whiteout=y\nfile d/y \"full\" trusted.overlay.whiteout=y\nfile z trusted.overlay.whiteout=y",
			"d/ 5 755 0:0\nd/.wh.x 0 0 0:0\nd/y 0 644 0:0 \"full\"\nz 0 644 0:0",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
			low, up := filepath.Join(base, "low"), filepath.Join(base, "up")
			overlaytest.Build(t, low, c.low)
			overlaytest.Build(t, up, c.up)
			opts := PackOptions{Lowers: []string{low}}
			if c.low == "" {
				opts.Lowers = nil
			}
			if got := strings.TrimSpace(listed(t, packed(t, up, opts))); got != c.want {
				t.Errorf("got:\n%s\nwant:\n%s", got, c.want)
			}
		})
	}
}

// A file that a program named like a mark is an error, never a deletion of another (moby's
// Diff deletes "x").
func TestPackFileNamedLikeAMark(t *testing.T) {
	overlaytest.Require(t, "root")
	for _, name := range []string{".wh.x", ".wh..wh..opq", ".wh.", ".wh..wh.plnk"} {
		for _, kind := range []string{"file", "dir", "fifo", "whiteout"} {
			for _, f := range []Format{OverlayTrusted, OverlayUser, Merged} {
				dir := t.TempDir()
				overlaytest.Build(t, dir, "file a\ndir d\n"+kind+" d/"+name+"\nfile z")
				if err := packErr(t, dir, "d/"+name, PackOptions{Format: f}); !errors.Is(err, ErrInvalidWhiteout) {
					t.Errorf("%v %s %s: %v", f, kind, name, err)
				}
			}
		}
	}
	// Deleted, it has no whiteout: that of ".wh..opq" would be the opaque mark.
	for _, path := range []string{"/d/.wh..opq", "/d/.wh.x", "/d/.wh."} {
		dir := t.TempDir()
		overlaytest.Build(t, dir, "file d/keep")
		opts := PackOptions{Format: Merged, Changes: []Change{{"/d", Modified}, {path, Deleted}}}
		if err := packErr(t, dir, path[1:], opts); !errors.Is(err, ErrInvalidWhiteout) {
			t.Errorf("%s deleted: %v", path, err)
		}
	}
	// In a merged tree a device 0:0 is no deletion either.
	dir := t.TempDir()
	overlaytest.Build(t, dir, "whiteout w")
	if err := packErr(t, dir, "w", PackOptions{Format: Merged}); !errors.Is(err, ErrInvalidWhiteout) {
		t.Errorf("device 0:0: %v", err)
	}
}

// With userxattr the marks are in user.overlay, and a redirect is refused as the kernel does.
func TestPackUserXattr(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	low, up := filepath.Join(base, "low"), filepath.Join(base, "up")
	overlaytest.Build(t, low, "file d/x\nfile e/x")
	overlaytest.Build(t, up, "dir d user.overlay.opaque=y\ndir e trusted.overlay.opaque=y\nwhiteout e/x")
	got := listed(t, packed(t, up, PackOptions{Format: OverlayUser, Lowers: []string{low}}))
	if want := "d/ 5 755 0:0\nd/.wh..wh..opq 0 0 0:0\ne/ 5 755 0:0\ne/.wh.x 0 0 0:0\n"; got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	overlaytest.Build(t, up, "dir f user.overlay.redirect=/d")
	if err := packErr(t, up, "f/", PackOptions{Format: OverlayUser, Lowers: []string{low}}); !errors.Is(err, unix.EPERM) {
		t.Error(err)
	}
}

// A redirect that is no name inside the layers is an error, and is not followed.
func TestPackHostileRedirect(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	for _, redirect := range []string{"..", "/..", "/a/../..", "a/b", "", "/", "//a", "/a/", ".", "/./a", "a\\x00b"} {
		base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
		low, up := filepath.Join(base, "low"), filepath.Join(base, "up")
		overlaytest.Build(t, low, "file a/x")
		overlaytest.Build(t, up, "dir d trusted.overlay.redirect=\""+redirect+"\"")
		if err := packErr(t, up, "d/", PackOptions{Lowers: []string{low}}); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%q: %v", redirect, err)
		}
		if _, err := Changes(context.Background(), up, ReadOptions{Lowers: []string{low}}); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%q: %v", redirect, err)
		}
	}
	base := t.TempDir()
	overlaytest.Build(t, base, "dir d trusted.overlay.redirect=a")
	if err := packErr(t, base, "d/", PackOptions{}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("without lowers: %v", err)
	}
}

// Merged: only what changed is packed, and deletions become whiteouts.
func TestPackChanges(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	overlaytest.Build(t, base, "file a/b/c\nfile a/b/d\nfile a-\nfile z\nsymlink l -> a")
	changes := []Change{
		{"/z", Added},
		{"/a/b/x", Deleted},
		{"/a", Modified},
		{"/a/b/c", Modified},
		{"/y", Deleted},
		{"/a-", Added},
	}
	got := listed(t, packed(t, base, PackOptions{Format: Merged, Changes: changes}))
	want := "a/ 5 755 0:0\na/b/c 0 644 0:0\na/b/.wh.x 0 0 0:0\na- 0 644 0:0\n.wh.y 0 0 0:0\nz 0 644 0:0\n"
	if got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if got := listed(t, packed(t, base, PackOptions{Format: Merged, Changes: []Change{}})); got != "" {
		t.Errorf("no changes: %s", got)
	}
	for _, path := range []string{"/../x", "/a//b", "/a/./b", "/a/b\x00", ""} {
		packErr(t, base, "./", PackOptions{Format: Merged, Changes: []Change{{path, Modified}}})
	}
	packErr(t, base, "none", PackOptions{Format: Merged, Changes: []Change{{"/none", Modified}}})
	if err := packErr(t, base, "l", PackOptions{Format: Merged, Changes: []Change{{"/l/b/c", Modified}}}); !errors.Is(err, ErrChanged) {
		t.Error(err)
	}
}

// A change of the root alone is no Change; with the parent's tree given it is packed all the same.
func TestPackMergedRoot(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	old, now := filepath.Join(base, "old"), filepath.Join(base, "now")
	overlaytest.Build(t, old, "dir . 0700\nfile a")
	overlaytest.Build(t, now, "dir . 0710 user.x=1\nfile b")
	changes, err := Compare(context.Background(), now, old)
	must(t, err)
	for _, c := range []struct {
		lowers []string
		want   string
	}{
		{nil, ".wh.a 0 0 0:0\nb 0 644 0:0\n"},
		{[]string{old}, "./ 5 710 0:0 user.x=\"1\"\n.wh.a 0 0 0:0\nb 0 644 0:0\n"},
		{[]string{now}, ".wh.a 0 0 0:0\nb 0 644 0:0\n"},
	} {
		if got := listed(t, packed(t, now, PackOptions{Format: Merged, Changes: changes, Lowers: c.lowers})); got != c.want {
			t.Errorf("got:\n%s\nwant:\n%s", got, c.want)
		}
	}
}

// Owners go through the id map: in the headers, in ACLs, in capabilities. One outside of it is an
// error (peers drop the file).
func TestPackIDMap(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	m := IDMap{UIDs: []IDRange{{0, 100000, 1000}}, GIDs: []IDRange{{0, 200000, 1000}}}
	const v3 = `\x01\x00\x00\x03\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00`
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	root := "dir . 0755 uid=100000 gid=200000\n"
	for _, c := range []struct{ up, want string }{
		{"file f uid=100007 gid=200008", "f 0 644 7:8"},
		{"whiteout w", ".wh.w 0 0 0:0"},
		{`file f uid=100000 gid=200000 security.capability="` + v3 + `\xa0\x86\x01\x00"`, `f 0 644 0:0 security.capability="\x01\x00\x00\x02\x00 ` + strings.Repeat(`\x00`, 14) + `"`},
		{`file f uid=100000 gid=200000 security.capability="` + v3 + `\xa1\x86\x01\x00"`, `f 0 644 0:0 security.capability="\x01\x00\x00\x03\x00 ` + strings.Repeat(`\x00`, 14) + `\x01\x00\x00\x00"`},
	} {
		dir, err := os.MkdirTemp(base, "")
		must(t, err)
		overlaytest.Build(t, dir, root+c.up)
		if got := strings.TrimSpace(listed(t, packed(t, dir, PackOptions{IDMap: m}))); got != c.want {
			t.Errorf("%s: got\n%s\nwant\n%s", c.up, got, c.want)
		}
	}
	for _, up := range []string{"file f", "file f uid=100000", "file f uid=101000 gid=200000", "symlink f -> x", "char f 1:3", "file f uid=100000 gid=200000 security.capability=\"" + v3 + "\\x05\\x00\\x00\\x00\""} {
		dir, err := os.MkdirTemp(base, "")
		must(t, err)
		overlaytest.Build(t, dir, root+up)
		if err := packErr(t, dir, "f", PackOptions{IDMap: m}); !errors.Is(err, ErrUnmapped) {
			t.Errorf("%s: %v", up, err)
		}
	}
	bad := IDMap{UIDs: []IDRange{{0, 0, 10}, {5, 100, 10}}}
	packErr(t, base, "./", PackOptions{IDMap: bad})
}

func TestPackClamp(t *testing.T) {
	overlaytest.Require(t, "root")
	dir := t.TempDir()
	overlaytest.Build(t, dir, "file old mtime=5.5\nfile new mtime=100.5\nfile same mtime=50.25")
	want := t.TempDir()
	overlaytest.Build(t, want, "file old mtime=5.5\nfile new mtime=50.0\nfile same mtime=50.0")
	for _, d := range []string{dir, want} {
		must(t, os.Chmod(d, 0o755))
	}
	if string(packed(t, want, PackOptions{})) != string(packed(t, dir, PackOptions{Clamp: unixTime(50)})) {
		t.Error("times are not clamped")
	}
}

// TestPackAllMarks: with AllMarks the tar does not depend on whether the lowers have what is hidden.
func TestPackAllMarks(t *testing.T) {
	overlaytest.Require(t, "root", "mknod")
	overlaytest.NoLeaks(t)
	dir, empty, full := t.TempDir(), t.TempDir(), t.TempDir()
	overlaytest.Build(t, full, "file a/gone \"x\"\nfile b/hidden \"x\"")
	overlaytest.Build(t, dir, "whiteout a/gone\ndir b trusted.overlay.opaque=\"y\"")
	want := string(packed(t, dir, PackOptions{Lowers: []string{full}}))
	if !strings.Contains(want, "a/.wh.gone") || !strings.Contains(want, "b/.wh..wh..opq") {
		t.Fatal("marks are missing")
	}
	if string(packed(t, dir, PackOptions{Lowers: []string{empty}})) == want {
		t.Error("marks that hide nothing are packed")
	}
	for _, lower := range []string{full, empty} {
		if string(packed(t, dir, PackOptions{Lowers: []string{lower}, AllMarks: true})) != want {
			t.Errorf("not all marks over %s", lower)
		}
	}
}
