package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// removeAsDocker removes a layer that is in use as Docker does, which takes no locks.
func removeAsDocker(t *testing.T, home, id string) {
	t.Helper()
	link, err := os.ReadFile(filepath.Join(home, id, linkName))
	must(t, err)
	err = unix.Unmount(filepath.Join(home, id, mergedName), unix.MNT_DETACH)
	must(t, errors.Join(err, os.Remove(filepath.Join(home, linkDir, string(link))), os.RemoveAll(filepath.Join(home, id))))
}

// putElsewhere puts a layer by another Driver, as another process that takes it over would.
func putElsewhere(t *testing.T, home, id string) {
	t.Helper()
	other, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	must(t, other.Put(id))
	must(t, other.Cleanup())
}

// unmountedByOthers are ways in which a layer that is counted is mounted no more.
var unmountedByOthers = map[string]func(t *testing.T, d *Driver, path string){
	"cleaned up, put by another process": func(t *testing.T, d *Driver, _ string) {
		must(t, d.Cleanup())
		putElsewhere(t, d.home, "box")
	},
	"by hand": func(t *testing.T, _ *Driver, path string) {
		must(t, unix.Unmount(path, unix.MNT_DETACH))
	},
	"by Docker": func(t *testing.T, _ *Driver, path string) {
		must(t, errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.Remove(path)))
	},
}

// TestUnmountedByOthers: a layer that somebody else has unmounted while it was counted is mounted again by Get, for ApplyDiff too,
// and not shown without the layers below.
func TestUnmountedByOthers(t *testing.T) {
	for name, unmount := range unmountedByOthers {
		for _, kept := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, kept=%v", name, kept), func(t *testing.T) {
				d := keptHome(t)
				must(t, d.CreateReadWrite("box", "layer2", nil))
				if kept {
					getKept(t, d, "box")
				}
				want, err := d.Get("box", "")
				must(t, err)
				unmount(t, d, want)
				path, err := d.Get("box", "")
				must(t, err)
				if path != want {
					t.Errorf("%s, before %s", path, want)
				}
				wantChain(t, path, 3)
				unmount(t, d, path)
				_, err = d.ApplyDiff("box", "layer2", bytes.NewReader(makeTar(t, file(".wh.f0", ""), file("new", "x"))))
				must(t, err)
				must(t, d.Put("box"))
				must(t, d.Put("box"))
				wantErr(t, d.Put("box"), ErrNotMounted)
				path, err = d.Get("box", "")
				must(t, err)
				if _, err := os.Lstat(path + "/f0"); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("f0, which the diff deletes: %v", err)
				}
				if data, err := os.ReadFile(path + "/new"); err != nil || string(data) != "x" {
					t.Errorf("new: %q %v", data, err)
				}
				must(t, d.Put("box"))
				must(t, d.Remove("box"))
			})
		}
	}
}

// TestAdoptedThenUnmounted: a mount that a former process left counts as a use, whoever ends it.
func TestAdoptedThenUnmounted(t *testing.T) {
	d := keptHome(t)
	must(t, d.CreateReadWrite("box", "layer2", nil))
	other, err := New(d.home, quietOptions(DurabilityOff))
	must(t, err)
	path, err := other.Get("box", "")
	must(t, err)
	must(t, other.Cleanup())
	getPut(t, d, "box", 1)
	must(t, errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.Remove(path)))
	path, err = d.Get("box", "")
	must(t, err)
	wantChain(t, path, 3)
	must(t, d.Put("box"))
	must(t, d.Put("box"))
	wantErr(t, d.Put("box"), ErrNotMounted)
}

// TestPlainStaysPlain: a merged directory that a crash has left does not lead the second Get of a base layer, or a diff, astray.
func TestPlainStaysPlain(t *testing.T) {
	d := keptHome(t)
	must(t, d.CreateReadWrite("box", "", nil))
	must(t, os.Mkdir(d.home+"/box/merged", 0o700))
	want, err := d.Get("box", "")
	must(t, err)
	path, err := d.Get("box", "")
	must(t, err)
	if path != want {
		t.Errorf("%s, before %s", path, want)
	}
	_, err = d.ApplyDiff("box", "", bytes.NewReader(makeTar(t, file("new", "x"))))
	must(t, err)
	if _, err := os.Lstat(d.home + "/box/diff/new"); err != nil {
		t.Error(err)
	}
	must(t, errors.Join(d.Put("box"), d.Put("box")))
}

// TestRemovedByOthers: what is counted of a layer that others have removed neither counts for a new one of its name nor stays open.
func TestRemovedByOthers(t *testing.T) {
	for _, kept := range []bool{false, true} {
		for name, end := range map[string]func(t *testing.T, d *Driver){
			"Put":    func(t *testing.T, d *Driver) { wantErr(t, d.Put("box"), ErrLayerNotFound) },
			"Remove": func(t *testing.T, d *Driver) { must(t, d.Remove("box")) },
			"Create": func(*testing.T, *Driver) {},
			"Create elsewhere, Get": func(t *testing.T, d *Driver) {
				other, err := New(d.home, quietOptions(DurabilityOff))
				must(t, err)
				must(t, errors.Join(other.CreateReadWrite("box", "layer2", nil), other.Cleanup()))
				getPut(t, d, "box", 1)
				must(t, d.Remove("box"))
			},
			"Create elsewhere, Rebase": func(t *testing.T, d *Driver) {
				other, err := New(d.home, quietOptions(DurabilityOff))
				must(t, err)
				must(t, errors.Join(other.CreateReadWrite("box", "layer2", nil), other.Cleanup()))
				must(t, errors.Join(d.Rebase("box", "layer1"), d.Remove("box")))
			},
			"Create elsewhere, RecordDigests": func(t *testing.T, d *Driver) {
				other, err := New(d.home, quietOptions(DurabilityOff))
				must(t, err)
				must(t, errors.Join(other.CreateReadWrite("box", "layer2", nil), other.Cleanup()))
				must(t, errors.Join(d.RecordDigests(t.Context(), "box"), d.Remove("box")))
			},
			"Create elsewhere, Remove": func(t *testing.T, d *Driver) {
				other, err := New(d.home, quietOptions(DurabilityOff))
				must(t, err)
				must(t, errors.Join(other.CreateReadWrite("box", "layer2", nil), other.Cleanup()))
				must(t, d.Remove("box"))
			},
		} {
			t.Run(fmt.Sprintf("%s, kept=%v", name, kept), func(t *testing.T) {
				d := keptHome(t)
				must(t, d.CreateReadWrite("box", "layer2", nil))
				getPut(t, d, "box", 1) // opens what stays open of the layers below
				if kept {
					getKept(t, d, "box")
				}
				for range 5 {
					path, err := d.Get("box", "")
					must(t, err)
					before := openDescriptors(t)
					removeAsDocker(t, d.home, "box")
					end(t, d)
					if name != "Create" && len(d.layers.states) != 0 {
						t.Errorf("%d states are left", len(d.layers.states))
					}
					must(t, d.CreateReadWrite("box", "layer2", nil))
					d.trash.wait()
					if n := openDescriptors(t); n > before {
						t.Errorf("%d descriptors, before %d", n, before)
					}
					again, err := d.Get("box", "")
					must(t, err)
					if again != path {
						t.Errorf("%s, before %s", again, path)
					}
					wantChain(t, again, 3)
					must(t, d.Put("box"))
					wantErr(t, d.Put("box"), ErrNotMounted)
				}
				must(t, d.Remove("box"))
			})
		}
	}
}

// TestPutItsOwn: Put ends the mount that Get made, and not that of another layer of the same name: one that another process
// has made since, or one in a home that is mounted over this one.
func TestPutItsOwn(t *testing.T) {
	for _, kept := range []bool{false, true} {
		t.Run(fmt.Sprintf("made anew, kept=%v", kept), func(t *testing.T) {
			d := keptHome(t)
			must(t, d.CreateReadWrite("box", "layer2", nil))
			if kept {
				getKept(t, d, "box")
			}
			_, err := d.Get("box", "")
			must(t, err)
			removeAsDocker(t, d.home, "box")
			other, err := New(d.home, quietOptions(DurabilityOff))
			must(t, err)
			must(t, other.CreateReadWrite("box", "layer2", nil))
			path, err := other.Get("box", "")
			must(t, err)
			wantErr(t, d.Put("box"), ErrLayerNotFound)
			wantChain(t, path, 3)
			must(t, errors.Join(other.Put("box"), other.Cleanup()))
		})
		t.Run(fmt.Sprintf("covered, kept=%v", kept), func(t *testing.T) {
			overlaytest.Require(t, "root", "overlay", "tmpfs")
			overlaytest.NoLeaks(t)
			home := t.TempDir()
			var drivers []*Driver
			var path string
			for range 2 {
				must(t, unix.Mount("none", home, "tmpfs", 0, ""))
				must(t, unix.Mount("", home, "", unix.MS_PRIVATE, ""))
				d, err := New(home, quietOptions(DurabilityOff))
				must(t, err)
				drivers = append(drivers, d)
				deepChain(t, d, 3)
				must(t, d.CreateReadWrite("box", "layer2", nil))
				if kept {
					getKept(t, d, "box")
				}
				path, err = d.Get("box", "")
				must(t, err)
			}
			_, err := drivers[0].Get("box", "")
			wantErr(t, err, ErrLayerInUse) // of the layer out of sight
			must(t, drivers[0].Put("box"))
			wantChain(t, path, 3)
			must(t, errors.Join(drivers[1].Put("box"), drivers[1].Cleanup(), unix.Unmount(home, 0)))
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("beneath: %v", err)
			}
			must(t, errors.Join(drivers[0].Cleanup(), unix.Unmount(home, 0)))
		})
	}
}

// TestDetachedHome: a home that was unmounted lazily and mounted again is used on, by the ways that name open directories too.
func TestDetachedHome(t *testing.T) {
	for _, n := range []int{3, 120, 250} { // by paths, by /proc/self/fd/N, by N
		t.Run(sizeName(n), func(t *testing.T) {
			overlaytest.Require(t, "root", "overlay")
			overlaytest.NoLeaks(t)
			src, home := t.TempDir(), t.TempDir()
			mount := func() {
				must(t, unix.Mount(src, home, "", unix.MS_BIND, ""))
				must(t, unix.Mount("", home, "", unix.MS_PRIVATE, ""))
			}
			mount()
			d, err := New(home, quietOptions(DurabilityOff))
			must(t, err)
			top := deepChain(t, d, n)
			must(t, d.CreateReadWrite("box", top, nil))
			getPut(t, d, "box", 4)
			for range 2 {
				must(t, unix.Unmount(home, unix.MNT_DETACH))
				mount()
				for range 3 {
					path, err := d.Get("box", "")
					must(t, err)
					wantChain(t, path, n)
					view, err := d.Mount(top, MountOpts{})
					must(t, err)
					wantChain(t, view.Path(), n)
					must(t, errors.Join(view.Close(), d.Put("box")))
				}
			}
			must(t, errors.Join(d.Cleanup(), unix.Unmount(home, unix.MNT_DETACH)))
		})
	}
}
