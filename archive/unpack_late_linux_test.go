package archive

import (
	"path/filepath"
	"strconv"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// TestUnpackMarksLate: a mark that comes behind what the stream has made leaves that alone, in a layer as through a mount.
func TestUnpackMarksLate(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	for i, c := range [][2]string{
		{"file d/old \"1\"", "dir d\ndir d/new 0700\nfile d/new/f \"x\"\nfile d/.wh..wh..opq\n"},
		{"file d/old \"1\"", "dir d\ndir d/new 0700\ndir d/new/empty\nfile d/.wh..wh..opq\n"},
		{"file d/old \"1\"", "file d/new/f \"x\"\nfile d/.wh..wh..opq\n"},
		{"file d/old \"1\"", "dir new\nfile new/f \"x\"\nfile .wh..wh..opq\n"},
		{"file d/old \"1\"", "dir d\nfile d/f \"x\"\nfile .wh.d\n"},
		{"file d \"1\"", "dir d\nfile d/f \"x\"\nfile .wh.d\n"},
		{"symlink d -> x", "dir d\nfile d/f \"x\"\nfile .wh.d\n"},
		{"file other \"1\"", "dir d\nfile d/f \"x\"\nfile .wh.d\n"},
		{"file other \"1\"", "dir d\nfile .wh.d\n"},
		{"file p/d \"1\"", "dir p\ndir p/d\nfile p/d/f \"x\"\nfile p/.wh.d\n"},
	} {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			dir := t.TempDir()
			path := func(name string) string { return filepath.Join(dir, name) }
			for _, name := range []string{"lower", "tree"} {
				overlaytest.Build(t, path(name), c[0])
			}
			overlaytest.Build(t, path("upper"), "")
			stream := mustTar(t, c[1])
			mustUnpack(t, path("upper"), stream, UnpackOptions{Lowers: []string{path("lower")}})
			mustUnpack(t, path("tree"), stream, UnpackOptions{Format: Merged})
			o := overlaytest.Mount(t, []string{path("lower")}, path("upper"), path("work"), path("merged"))
			want := overlaytest.Tree(t, o.Merged, overlaytest.NoDirTimes, overlaytest.NoRoot)
			o.Unmount()
			overlaytest.Compare(t, want, overlaytest.Tree(t, path("tree"), overlaytest.NoDirTimes, overlaytest.NoRoot))
		})
	}
}
