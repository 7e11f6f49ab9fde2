package overlay2

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// view is Mount with a Close at the end of the test.
func view(t testing.TB, d *Driver, id string) *Mount {
	t.Helper()
	m, err := d.Mount(id, MountOpts{})
	must(t, err)
	t.Cleanup(func() { must(t, m.Close()) })
	return m
}

// inMountTable reports whether something beneath the home is mounted.
func inMountTable(t testing.TB, d *Driver) bool {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	return strings.Contains(string(data), d.home)
}

// viewDrivers runs f with each way to make a view: the new API, and names and numbers in a
// mount namespace.
func viewDrivers(t *testing.T, f func(t *testing.T, d *Driver)) {
	for _, method := range methods(t) {
		t.Run(method.String(), func(t *testing.T) {
			f(t, newTestDriver(t, t.TempDir(), Options{MountMethod: method}))
		})
	}
}

func TestMountView(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	viewDrivers(t, func(t *testing.T, d *Driver) {
		deepChain(t, d, 3)
		must(t, d.CreateReadWrite("box", "layer2", nil))
		fill(t, d, "box", `file new "box"`)
		for n, id := range []string{"layer0", "layer1", "layer2", "box"} {
			want := tree(t, d, id)
			a, b := view(t, d, id), view(t, d, id)
			if inMountTable(t, d) {
				t.Fatal("a view is in the mount table")
			}
			for _, m := range []*Mount{a, b} {
				wantChain(t, m.Path(), min(n+1, 3))
				overlaytest.Compare(t, want, overlaytest.Tree(t, m.Path()+"/.", overlaytest.NoOverlayXattrs))
				if err := unix.Mkdirat(m.FD(), "d", 0o700); !errors.Is(err, unix.EROFS) {
					t.Errorf("%s can be written: %v", id, err)
				}
			}
			wantErr(t, d.Remove(id), ErrLayerInUse)
			must(t, a.Close())
			must(t, a.Close())
			if a.FD() != -1 {
				t.Error("closed, and has a descriptor")
			}
			wantErr(t, d.Remove(id), ErrLayerInUse)
			wantChain(t, b.Path(), min(n+1, 3))
			must(t, b.Close())
		}
		must(t, d.Remove("box"))
		if len(d.layers.states) != 0 {
			t.Errorf("%d states stay", len(d.layers.states))
		}
	})
}

func TestMountAttach(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	viewDrivers(t, func(t *testing.T, d *Driver) {
		deepChain(t, d, 2)
		for _, id := range []string{"layer0", "layer1"} {
			m := view(t, d, id)
			path := t.TempDir()
			must(t, m.Attach(path))
			if _, err := os.Stat(path + "/f0"); err != nil {
				t.Error(err)
			}
			if err := os.WriteFile(path+"/x", nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("can be written: %v", err)
			}
			wantErr(t, m.Attach(t.TempDir()), ErrLayerInUse)
			f, err := m.File()
			must(t, err)
			names, err := f.Readdirnames(-1)
			must(t, errors.Join(err, f.Close()))
			if len(names) < 2 {
				t.Errorf("names %q", names)
			}
			must(t, m.Close())
			if _, err := os.Stat(path + "/f0"); err != nil {
				t.Errorf("after Close: %v", err)
			}
			must(t, unix.Unmount(path, 0))
			wantErr(t, m.Attach(path), os.ErrClosed)
			_, err = m.File()
			wantErr(t, err, os.ErrClosed)
		}
		m := view(t, d, "layer1")
		wantErr(t, m.Attach(d.home+"/none"), fs.ErrNotExist)
		must(t, os.Symlink(t.TempDir(), d.home+"/staging/link"))
		if err := m.Attach(d.home + "/staging/link"); err == nil {
			t.Error("attached through a symlink")
		}
		must(t, os.Remove(d.home+"/staging/link"))
	})
}

func TestMountErrors(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	deepChain(t, d, 1)
	must(t, d.CreateReadWrite("box", "layer0", nil))
	_, err := d.Mount("none", MountOpts{})
	wantErr(t, err, ErrLayerNotFound)
	_, err = d.Mount("../box", MountOpts{})
	wantErr(t, err, ErrInvalidID)
	_, err = d.Mount("box", MountOpts{Label: `a",lowerdir=/`})
	wantErr(t, err, ErrInvalidOption)
	_, put := get(t, d, "box")
	_, err = d.Mount("box", MountOpts{})
	wantErr(t, err, ErrLayerInUse)
	put()
	must(t, os.WriteFile(d.home+"/box/incomplete", nil, 0o600))
	_, err = d.Mount("box", MountOpts{})
	wantErr(t, err, ErrIncomplete)
	must(t, os.Remove(d.home+"/box/incomplete"))
	replaceLink(t, d.home, "layer0", "/etc")
	_, err = d.Mount("box", MountOpts{})
	wantErr(t, err, ErrCorrupt)
	must(t, os.Remove(linkPath(t, d.home, "layer0")))
	must(t, os.Symlink("../layer0/diff", linkPath(t, d.home, "layer0")))
}

// TestMountDeep: as many layers as a mount can have, its own included.
func TestMountDeep(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{MountMethod: MountDescriptors})
	parent := deepChain(t, d, maxLowers)
	must(t, d.Create("top", parent, nil))
	for _, method := range []MountMethod{MountAuto, MountDescriptors} {
		d.opts.MountMethod = method
		m := view(t, d, parent)
		wantChain(t, m.Path(), maxLowers)
		_, err := d.Mount("top", MountOpts{})
		wantErr(t, err, ErrTooDeep)
	}
}

// TestMountDataMounts: what MountData says mounts the same tree by mount(2) and by fsconfig(2).
func TestMountDataMounts(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	d := newTestDriver(t, filepath.Join(t.TempDir(), `a,b:c\d e`), Options{MountOptions: []string{"xino=off", "metacopy=on"}})
	deepChain(t, d, 4)
	must(t, d.CreateReadWrite("box", "layer3", nil))
	for _, id := range []string{"layer2", "box"} {
		m, err := d.MountData(id, "")
		must(t, err)
		if m.Type != "overlay" || m.Source != "overlay" || m.ReadOnly != (id != "box") {
			t.Errorf("%+v", m)
		}
		depth := 3
		if id == "box" {
			depth = 4
		}
		target := t.TempDir()
		must(t, unix.Mount(m.Source, target, m.Type, 0, strings.Join(m.Options, ",")))
		wantChain(t, target, depth)
		must(t, unix.Unmount(target, 0))
		if d.facts.newAPI != yes {
			continue
		}
		c, err := sys.OpenFS(m.Type)
		must(t, err)
		for _, kv := range m.Fsconfig {
			c.Set(kv[0], kv[1])
		}
		fd, err := c.Mount(0)
		must(t, errors.Join(err, c.Close()))
		wantChain(t, sys.ProcPath(fd), depth)
		must(t, sys.Close(fd))
	}
	m, err := d.MountData("layer0", "")
	must(t, err)
	if want := (MountData{Type: "bind", Source: d.home + "/layer0/diff", Options: []string{"rbind", "ro"}, ReadOnly: true}); fmt.Sprint(m) != fmt.Sprint(want) {
		t.Errorf("%+v", m)
	}
	m, err = d.MountData("box", "u:r:t:s0:c1,c2")
	must(t, err)
	if got := m.Options[len(m.Options)-1]; got != `context="u:r:t:s0:c1,c2"` {
		t.Error(got)
	}
	if got := m.Fsconfig[len(m.Fsconfig)-1]; got != [2]string{"context", "u:r:t:s0:c1,c2"} {
		t.Error(got)
	}
	_, err = d.MountData("none", "")
	wantErr(t, err, ErrLayerNotFound)
	_, err = d.MountData("box", "x,lowerdir=/")
	wantErr(t, err, ErrInvalidOption)
}
