package archive

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// FuzzRoundTrip makes a tree and a layer over it as the input says, and sends both through a tar.
func FuzzRoundTrip(f *testing.F) {
	overlaytest.Require(f, "root", "tmpfs")
	f.Add([]byte("\x00\x03dir\x01\x05dir/f\x40\x02\x04dir/l\x03\x03dev\x04\x04fifo\x05\x05dir/g\x09\x01x"), []byte("\x06\x03dir\x07\x05other\x01\x05dir/f\x10"))
	f.Add([]byte("\x01\x01a\xff\x05\x01b\x00\x08\x01b\x20\x08\x01a\x77"), []byte("\x06\x01a\x00\x01a\x01\x03a/b\x03"))
	f.Add([]byte("\x00\x01d\x00\x03d/e\x01\x05d/e/f\x11"), []byte("\x00\x01d\x09\x01d\x01\x03d/x\x01"))
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		watched(t, func() { roundTrip(t, lower, upper) })
	})
}

// roundTrip makes the two trees, and holds that the tar of each gives it again.
func roundTrip(t *testing.T, lower, upper []byte) {
	t.Helper()
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs", Size: 64 << 20})
	path := func(name string) string { return filepath.Join(base, name) }
	for dir, program := range map[string][]byte{"low": lower, "up": upper} {
		must(t, os.Mkdir(path(dir), 0o755))
		grow(t, path(dir), program, dir == "up")
	}
	b := packed(t, path("low"), PackOptions{})
	unpackInto(t, path("low2"), b, UnpackOptions{})
	overlaytest.Compare(t, overlaytest.Tree(t, path("low"), overlaytest.NoRootTime), overlaytest.Tree(t, path("low2"), overlaytest.NoRootTime))
	if !bytes.Equal(packed(t, path("low2"), PackOptions{}), b) {
		t.Error("the unpacked tree gives another tar")
	}
	lowers := []string{path("low")}
	b = packed(t, path("up"), PackOptions{Lowers: lowers})
	unpackInto(t, path("up2"), b, UnpackOptions{Lowers: lowers})
	if again := packed(t, path("up2"), PackOptions{Lowers: lowers}); !bytes.Equal(again, b) {
		t.Errorf("the unpacked layer gives another tar:\n%s", overlaytest.Diff(listed(t, b), listed(t, again)))
	}
	one, err := Changes(context.Background(), path("up"), ReadOptions{Lowers: lowers})
	must(t, err)
	other, err := Changes(context.Background(), path("up2"), ReadOptions{Lowers: lowers})
	must(t, err)
	if d := overlaytest.Diff(changeText(one), changeText(other)); d != "" {
		t.Errorf("the unpacked layer has other changes:\n%s", d)
	}
	bare := mountedTree(t, base, path("up"), path("low"))
	if d := overlaytest.Diff(bare, mountedTree(t, base, path("up2"), path("low"))); d != "" {
		t.Errorf("mounted trees differ:\n%s", d)
	}
}

// mountedTree tells what an overlay shows, without names that cannot be read: a whiteout where
// nothing merges, which the kernel never makes and a tar doesn't keep.
func mountedTree(t *testing.T, base, up, low string) string {
	t.Helper()
	o := overlaytest.Mount(t, []string{low}, up, filepath.Join(base, "work"), filepath.Join(base, "m"))
	defer o.Unmount()
	tree := overlaytest.Tree(t, filepath.Join(base, "m"), overlaytest.NoRootTime|overlaytest.NoOverlayXattrs)
	var out strings.Builder
	for line := range strings.Lines(tree) {
		if !strings.Contains(line, " unreadable: ") {
			out.WriteString(line)
		}
	}
	return out.String()
}

// grow makes a tree from bytes: each step is a verb, a name with its length in front, and one more byte.
// What doesn't work is left out; marks are made only in a layer.
func grow(t *testing.T, root string, program []byte, layer bool) {
	t.Helper()
	for steps := 0; len(program) >= 3 && steps < 60; steps++ {
		verb, size := program[0], int(program[1])
		program = program[2:]
		name := string(program[:min(size, len(program)-1)])
		program = program[len(name):]
		arg := program[0]
		program = program[1:]
		// Only names within the tree, and none that is an error to pack.
		name = filepath.Clean("/" + strings.ReplaceAll(name, "\x00", "0"))
		if name == "/" || strings.Contains(name, "/.wh.") || len(name) > 200 {
			continue
		}
		path := root + name
		_ = os.MkdirAll(filepath.Dir(path), 0o755)
		switch verb % 10 {
		case 0:
			_ = os.Mkdir(path, 0o700|os.FileMode(arg&0o77))
		case 1:
			_ = os.WriteFile(path, bytes.Repeat([]byte{arg}, int(arg)*7), 0o600|os.FileMode(arg&0o77))
		case 2:
			_ = os.Symlink(strings.Repeat("x/", int(arg)/2)+"y", path)
		case 3:
			_ = unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, uint32(arg))))
		case 4:
			_ = unix.Mkfifo(path, uint32(arg))
		case 5:
			_ = os.Link(root+"/"+string(rune('a'+arg%8)), path)
		case 6:
			if layer {
				_ = unix.Mknod(path, unix.S_IFCHR, 0)
			}
		case 7:
			if layer && os.Mkdir(path, 0o755) == nil {
				_ = unix.Setxattr(path, "trusted.overlay.opaque", []byte("y"), 0)
			}
		case 8:
			_ = unix.Lsetxattr(path, "user."+string(rune('a'+arg%26)), bytes.Repeat([]byte{arg}, int(arg)), 0)
			_ = unix.Lchown(path, int(arg)<<16, int(arg))
		case 9:
			_ = os.Truncate(path, int64(arg)<<14)
		}
		at := unix.NsecToTimeval(int64(arg)*1e9 + int64(verb)*1000)
		_ = unix.Lutimes(path, []unix.Timeval{at, at})
	}
}
