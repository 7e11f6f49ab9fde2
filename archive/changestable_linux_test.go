package archive

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// Table of layers and what changed in them.
func TestChangesTable(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	for _, c := range []struct{ name, low, up, want string }{
		{"nothing", "file a", "", ""},
		{"base layer", "", "file a/b\nfile c\nwhiteout w", "A /a A /a/b A /c"},
		{"order is that of the whole path", "", "file a/b\nfile a-b\nfile a.c\nfile a0", "A /a A /a-b A /a.c A /a/b A /a0"},
		{"copied up and the same", "file a 0644 \"x\" user.a=1\nfile d/e", "file a 0644 \"x\" user.a=1\ndir d", ""},
		{"content of the same size and time (only reading tells)", "file a \"x\"", "file a \"y\"", "C /a"},
		{"size", "file a \"x\"", "file a \"xx\"", "C /a"},
		{"mode", "file a", "file a 0600", "C /a"},
		{"setuid", "file a 0755", "file a 04755", "C /a"},
		{"owner", "file a", "file a uid=1", "C /a"},
		{"group", "file a", "file a gid=1", "C /a"},
		{"nanosecond of the time", "file a mtime=5.000000001", "file a mtime=5.000000002", "C /a"},
		{"time before 1970", "file a mtime=-5.5", "file a mtime=-5.25", "C /a"},
		{"xattr alone", "file a user.a=1", "file a user.a=2", "C /a"},
		{"xattr more", "file a", "file a user.a=2", "C /a"},
		{"xattr less", "file a user.a=1", "file a", "C /a"},
		{"capability", "file a", "file a security.capability=\"\\x01\\x00\\x00\\x02\\x00\\x20\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\"", "C /a"},
		{
			"what overlayfs keeps for itself is no change", "dir d\nfile d/f",
			"dir . trusted.overlay.uuid=1 trusted.overlay.origin=2 trusted.overlay.impure=y\ndir d trusted.overlay.impure=y trusted.overlay.origin=x\nfile d/f trusted.overlay.nlink=U+0 trusted.overlay.origin=x user.overlay.uuid=x",
			"",
		},
		{"symlink", "symlink a -> b", "symlink a -> c", "C /a"},
		{"same symlink", "symlink a -> b", "symlink a -> b", ""},
		{"device", "char a 1:3", "char a 1:5", "C /a"},
		{"same device", "char a 1:3", "char a 1:3", ""},
		{"type", "char a 1:3", "block a 1:3", "C /a"},
		{"fifo for a file", "file a", "fifo a", "C /a"},
		{"whiteout", "file a/b", "whiteout a/b", "C /a D /a/b"},
		{"whiteout of nothing", "file a/b", "whiteout a/x\nwhiteout y", ""},
		{"whiteout of a directory", "file a/b/c", "whiteout a", "D /a"},
		{"whiteout in a new directory", "file a", "whiteout d/x\nfile d/y", "A /d A /d/y"},
		{"directory alone", "dir d 0755", "dir d 0700", "C /d"},
		{"time of a directory", "dir d mtime=1.5", "dir d mtime=2.5", "C /d"},
		{"beneath a directory", "file a/b/c \"1\"\nfile a/x/y", "file a/b/c \"2\"\ndir a/x", "C /a C /a/b C /a/b/c"},
		{"new beneath a directory", "dir a/b", "file a/b/c", "C /a C /a/b A /a/b/c"},
		{"opaque directory over files (moby says nothing of them)", "file d/a\nfile d/b\nfile d/e/f", "opaque d\nfile d/b\nfile d/c", "C /d D /d/a A /d/c D /d/e"},
		{"opaque directory with the same content", "file d/a\nfile d/e/f", "opaque d\nfile d/a\nfile d/e/f", ""},
		{"directory in an opaque one", "file d/e/f\nfile d/e/g", "opaque d\nfile d/e/f", "C /d C /d/e D /d/e/g"},
		{"whiteout in an opaque directory", "file d/a\nfile d/b", "opaque d\nwhiteout d/a\nfile d/b", "C /d D /d/a"},
		{"opaque directory over a file", "file d", "opaque d\nfile d/a", "C /d A /d/a"},
		{"opaque directory over nothing", "file a", "opaque d\nfile d/a", "A /d A /d/a"},
		{"opaque root is ignored as overlayfs does", "file a\nfile b", "opaque .\nfile b", ""},
		{"file over a directory", "file d/a/b", "file d", "C /d"},
		{"directory over a file", "file d", "file d/a/b", "C /d A /d/a A /d/a/b"},
		{"redirect, as rename makes it", "file old/a\nfile old/s/b", "dir new trusted.overlay.redirect=old\nwhiteout old", "A /new A /new/a A /new/s A /new/s/b D /old"},
		{"redirect over another directory", "file old/a\nfile old/s/b\nfile new/x\nfile new/s/b", "dir new trusted.overlay.redirect=/old\nwhiteout old", "C /new A /new/a D /new/x D /old"},
		{"redirect with a change beneath", "file old/a\nfile old/b", "dir new trusted.overlay.redirect=old\nfile new/a \"more\"\nwhiteout new/b\nwhiteout old", "A /new A /new/a D /old"},
		{"redirect deep in an opaque directory", "file p/q/a", "opaque o\ndir o/r trusted.overlay.redirect=/p/q", "A /o A /o/r A /o/r/a"},
		{"metacopy", "file a size=64K data=0:x", "file a 0600 size=64K trusted.overlay.metacopy=\"\"", "C /a"},
		{"metacopy without a change", "file a size=64K data=0:x", "file a size=64K trusted.overlay.metacopy=\"\"", ""},
		{"metacopy under a new name", "file a size=64K data=0:x", "file b size=64K trusted.overlay.metacopy=\"\" trusted.overlay.redirect=/a\nwhiteout a", "D /a A /b"},
		{"metacopy of another file", "file a size=64K data=0:x\nfile c size=64K data=0:y", "file c size=64K trusted.overlay.metacopy=\"\" trusted.overlay.redirect=/a", "C /c"},
		{
			"whiteouts that are files with an xattr", "file d/x\nfile d/y\nfile z",
			"dir d trusted.overlay.opaque=x\nfile d/x trusted.overlay.whiteout=y\nfile d/y", "C /d D /d/x",
		},
		{"hard links", "file a \"1\"\nlink b -> a", "file a \"2\"", "C /a"},
		{"a file named like a mark", "file a", "file .wh.a", "A /.wh.a"},
	} {
		t.Run(c.name, func(t *testing.T) {
			overlaytest.NoLeaks(t)
			base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
			low, up := filepath.Join(base, "low"), filepath.Join(base, "up")
			overlaytest.Build(t, low, c.low)
			overlaytest.Build(t, up, c.up)
			opts := ReadOptions{Lowers: []string{low}}
			if c.low == "" {
				opts.Lowers = nil
			}
			got, err := Changes(context.Background(), up, opts)
			must(t, err)
			if g := strings.Join(strings.Split(strings.TrimSpace(changeText(got)), "\n"), " "); g != c.want {
				t.Errorf("got:  %s\nwant: %s", g, c.want)
			}
		})
	}
}

// What a layer of the middle deleted is not in the parent.
func TestChangesOverWhiteouts(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	low, mid, up := filepath.Join(base, "low"), filepath.Join(base, "mid"), filepath.Join(base, "up")
	overlaytest.Build(t, low, "file a\nfile d/x\nfile d/y\nfile o/z")
	overlaytest.Build(t, mid, "whiteout a\nwhiteout d/x\nopaque o\nfile o/w")
	overlaytest.Build(t, up, "file a\nfile d/x\nwhiteout d/y\nwhiteout o/z\nfile o/w")
	got, err := Changes(context.Background(), up, ReadOptions{Lowers: []string{mid, low}})
	must(t, err)
	if want := "A /a\nC /d\nA /d/x\nD /d/y\n"; changeText(got) != want {
		t.Errorf("got:\n%s\nwant:\n%s", changeText(got), want)
	}
}

// A name is found in the right one of 500 lowers, and a directory of many names in many of them.
func TestChangesManyLowers(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	names := overlaytest.Names(500)
	var lowers []string
	var up strings.Builder
	for i, name := range names {
		dir := filepath.Join(base, "low", name)
		must(t, os.MkdirAll(filepath.Join(dir, "d"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "d", name), []byte("1"), 0o644))
		must(t, os.Chtimes(filepath.Join(dir, "d", name), unixTime(i), unixTime(i)))
		must(t, os.Chtimes(filepath.Join(dir, "d"), unixTime(1e9), unixTime(1e9)))
		lowers = append(lowers, dir)
		up.WriteString("file " + strconv.Quote("d/"+name) + " \"1\" mtime=" + strconv.Itoa(i) + "\n")
	}
	up.WriteString("file d/new\n")
	overlaytest.Build(t, filepath.Join(base, "up"), up.String())
	got, err := Changes(context.Background(), filepath.Join(base, "up"), ReadOptions{Lowers: lowers})
	must(t, err)
	if want := "C /d\nA /d/new\n"; changeText(got) != want {
		t.Errorf("got:\n%s\nwant:\n%s", changeText(got), want)
	}
}

func TestChangesOfMerged(t *testing.T) {
	_, err := Changes(context.Background(), t.TempDir(), ReadOptions{Format: Merged})
	if e := (*EntryError)(nil); !errors.Is(err, errors.ErrUnsupported) || !errors.As(err, &e) {
		t.Errorf("got %v", err)
	}
}

// Compare of plain trees.
func TestCompareTable(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	for _, c := range []struct{ name, old, new, want string }{
		{"nothing", "file a\nsymlink l -> a\nchar c 1:3", "file a\nsymlink l -> a\nchar c 1:3", ""},
		{"all", "file a", "file b/c\nfile b-c", "D /a A /b A /b-c A /b/c"},
		{"deleted tree is listed once", "file a/b/c\nfile d", "file d", "D /a"},
		{"names that sort around a slash", "file a/x\nfile a-\nfile a0", "file a/y\nfile a.", "C /a D /a- A /a. D /a/x A /a/y D /a0"},
		{"content", "file a \"1\"", "file a \"2\"", "C /a"},
		{"xattr", "file a user.x=1", "file a", "C /a"},
		{"overlayfs's own xattrs", "file a trusted.overlay.origin=1", "file a", ""},
		{"directory and file", "file a\nfile b/c", "file a/c\nfile b", "C /a A /a/c C /b"},
		{"mode of a directory", "file d/e", "dir d 0700\nfile d/e", "C /d"},
	} {
		t.Run(c.name, func(t *testing.T) {
			overlaytest.NoLeaks(t)
			base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
			overlaytest.Build(t, filepath.Join(base, "old"), c.old)
			overlaytest.Build(t, filepath.Join(base, "new"), c.new)
			got, err := Compare(context.Background(), filepath.Join(base, "new"), filepath.Join(base, "old"))
			must(t, err)
			if g := strings.Join(strings.Split(strings.TrimSpace(changeText(got)), "\n"), " "); g != c.want {
				t.Errorf("got:  %s\nwant: %s", g, c.want)
			}
		})
	}
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	overlaytest.Build(t, base, "file a/b")
	got, err := Compare(context.Background(), base, "")
	must(t, err)
	if want := "A /a\nA /a/b\n"; changeText(got) != want {
		t.Errorf("against nothing: %s", changeText(got))
	}
}

// Cancelling ends each of them.
func TestReadCancelled(t *testing.T) {
	overlaytest.NoLeaks(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	dir := t.TempDir()
	if _, err := Changes(ctx, dir, ReadOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("changes: %v", err)
	}
	if _, err := Compare(ctx, dir, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("compare: %v", err)
	}
}
