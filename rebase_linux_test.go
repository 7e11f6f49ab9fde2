package overlay2

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// TestRebase: layers filled over an empty one and then put over each other, in order, are the same tree as layers
// made one over the other, whiteouts and opaque directories included, and stay that for another Driver.
func TestRebase(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		home := filepath.Join(dir, "home")
		d := newTestDriver(t, home, Options{})
		tars := [][]byte{
			makeTar(t, file("a/", ""), file("a/x", "1"), file("b/", ""), file("b/gone", "1"), file("c", "1")),
			makeTar(t, file("a/.wh..wh..opq", ""), file("a/", ""), file("a/y", "2"), file("b/.wh.gone", ""), file("b/", "")),
			makeTar(t, file(".wh.c", ""), file("b/", ""), file("b/z", "3")),
		}
		parent := ""
		for i, data := range tars {
			id := []string{"0", "1", "2"}[i]
			apply(t, d, id, parent, data)
			parent = id
		}
		must(t, d.Create("empty", "", nil))
		for _, id := range []string{"r0", "r1", "r2"} {
			must(t, d.CreateReadWrite(id, "empty", nil))
			fill(t, d, id, "")
		}
		// As containerd's applier: into the upper directory, the marks as overlayfs keeps them.
		overlaytest.Build(t, home+"/r0/diff", "dir a\nfile a/x \"1\"\ndir b\nfile b/gone \"1\"\nfile c \"1\"")
		overlaytest.Build(t, home+"/r1/diff", "dir a\nopaque a\nfile a/y \"2\"\ndir b\nwhiteout b/gone")
		overlaytest.Build(t, home+"/r2/diff", "whiteout c\ndir b\nfile b/z \"3\"")
		must(t, d.Rebase("r1", "r0"))
		must(t, d.Rebase("r2", "r1"))
		must(t, d.Rebase("r2", "r1")) // nothing to do
		want := tree(t, d, "2", overlaytest.NoRoot, overlaytest.NoTimes)
		overlaytest.Compare(t, want, tree(t, d, "r2", overlaytest.NoRoot, overlaytest.NoTimes))
		overlaytest.Compare(t, want, tree(t, openTestDriver(t, home, Options{}), "r2", overlaytest.NoRoot, overlaytest.NoTimes))
		wantErr(t, d.Remove("r1"), ErrLayerInUse)
		must(t, d.Remove("r2"))
		must(t, d.Remove("r1"))
	})
}

// TestRebaseRefused: a layer that something depends on stays over its parent.
func TestRebaseRefused(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	home := filepath.Join(t.TempDir(), "home")
	d := newTestDriver(t, home, Options{})
	for _, id := range []string{"base", "other"} {
		apply(t, d, id, "", makeTar(t, file("f", id)))
	}
	must(t, d.CreateReadWrite("box", "base", nil))
	must(t, d.CreateReadWrite("mid", "base", nil))
	must(t, d.CreateReadWrite("child", "mid", nil))
	for _, c := range []struct {
		id, parent string
		want       error
	}{
		{"mid", "other", ErrLayerInUse},
		{"mid", "child", ErrLayerInUse},
		{"box", "box", ErrInvalidID},
		{"box", "", ErrInvalidOption},
		{"other", "base", ErrInvalidOption},
		{"none", "base", ErrLayerNotFound},
		{"box", "none", ErrLayerNotFound},
		{"../x", "base", ErrInvalidID},
	} {
		t.Run(c.id+" "+c.parent, func(t *testing.T) { wantErr(t, d.Rebase(c.id, c.parent), c.want) })
	}
	_, put := get(t, d, "box")
	wantErr(t, d.Rebase("box", "other"), ErrLayerInUse)
	wantErr(t, openTestDriver(t, home, Options{}).Rebase("box", "other"), ErrLayerInUse)
	put()
	diff, err := d.Diff("box", "base")
	must(t, err)
	wantErr(t, d.Rebase("box", "other"), ErrLayerInUse)
	must(t, diff.Close())
	must(t, os.WriteFile(home+"/box/"+lowerNew, []byte("left by a crash"), 0o600))
	must(t, d.Rebase("box", "other"))
	path, put := get(t, d, "box")
	defer put()
	if data, err := os.ReadFile(path + "/f"); err != nil || string(data) != "other" {
		t.Errorf("f is %q: %v", data, err)
	}
}
