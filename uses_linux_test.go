package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// die makes what a Driver has got look like that of a dead process to other Drivers.
func die(d *Driver) {
	for _, s := range d.layers.states {
		s.use.drop()
		s.use = nil
	}
}

// TestSharedUse: a layer that two processes have got stays mounted until both have put it, and
// cannot be removed or filled by either before.
func TestSharedUse(t *testing.T) {
	a := newTestDriver(t, t.TempDir(), Options{})
	b := openTestDriver(t, a.home, Options{}) // as another process: it shares no memory
	must(t, a.Create("base", "", nil))
	must(t, a.CreateReadWrite("box", "base", nil))
	path, err := a.Get("box", "")
	must(t, err)
	wantErr(t, b.Put("box"), ErrNotMounted)
	wantErr(t, b.Remove("box"), ErrLayerInUse)
	wantErr(t, errOf(b.ApplyDiff("box", "base", nil)), ErrLayerInUse)
	for range 2 {
		if again, err := b.Get("box", ""); err != nil || again != path {
			t.Fatalf("%s %v", again, err)
		}
	}
	must(t, a.Put("box"))
	wantErr(t, a.Put("box"), ErrNotMounted)
	wantErr(t, a.Remove("box"), ErrLayerInUse)
	must(t, os.WriteFile(path+"/f", nil, 0o600))
	must(t, b.Put("box"))
	if mounted, err := mountinfo.Mounted(path); err != nil || !mounted {
		t.Fatalf("unmounted under a user: %v %v", mounted, err)
	}
	must(t, b.Put("box"))
	wantErr(t, b.Put("box"), ErrNotMounted)
	if mounted, err := mountinfo.Mounted(path); err == nil && mounted {
		t.Error("still mounted")
	}
	// One that is not mounted is in use as well.
	must(t, a.CreateReadWrite("plain", "", nil))
	_, err = a.Get("plain", "")
	must(t, err)
	wantErr(t, b.Remove("plain"), ErrLayerInUse)
	must(t, a.Put("plain"))
	must(t, b.Remove("plain"))
	must(t, a.Remove("box"))
}

// TestSharedReaders: what one process reads another one neither removes nor fills, but may use and give back.
func TestSharedReaders(t *testing.T) {
	a := newTestDriver(t, t.TempDir(), Options{})
	b := openTestDriver(t, a.home, Options{}) // as another process: it shares no memory
	content := makeTar(t, file("name", "one"))
	apply(t, a, "base", "", content)
	readers := map[string]func(id string) (io.Closer, error){
		"diff":  func(id string) (io.Closer, error) { return a.Diff(id, "base") },
		"files": func(id string) (io.Closer, error) { return a.Files(id) },
		"view":  func(id string) (io.Closer, error) { return a.Mount(id, MountOpts{}) },
	}
	for name, open := range readers {
		id := "read-by-" + name
		must(t, a.CreateReadWrite(id, "base", nil))
		_, err := a.ApplyDiff(id, "base", bytes.NewReader(content))
		must(t, err)
		first, err := open(id)
		must(t, err)
		second, err := open(id)
		must(t, err)
		for _, d := range []*Driver{a, b} {
			wantErr(t, d.Remove(id), ErrLayerInUse)
			wantErr(t, errOf(d.ApplyDiff(id, "base", bytes.NewReader(content))), ErrLayerInUse)
		}
		path, err := b.Get(id, "")
		must(t, err)
		must(t, b.Put(id))
		if mounted, err := mountinfo.Mounted(path); err == nil && mounted {
			t.Errorf("%s: a reader keeps the layer mounted", id)
		}
		must(t, first.Close())
		wantErr(t, b.Remove(id), ErrLayerInUse)
		must(t, second.Close())
		_, err = b.ApplyDiff(id, "base", bytes.NewReader(content))
		must(t, err)
		must(t, b.Remove(id))
		_, err = open(id)
		wantErr(t, err, ErrLayerNotFound)
	}
}

// TestUseForked: a child between fork and exec has copies of all descriptors. They keep no lock that was given up.
func TestUseForked(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	_, err := d.Get("box", "")
	must(t, err)
	state, unlock := d.layers.lock("box")
	fd, err := unix.FcntlInt(uintptr(state.use.fd), unix.F_DUPFD_CLOEXEC, 0)
	unlock()
	must(t, err)
	defer func() { must(t, unix.Close(fd)) }()
	must(t, d.Put("box"))
	must(t, d.Remove("box"))
}

// TestSharedUseRace: many users in several processes, each writing while it has the layer.
func TestSharedUseRace(t *testing.T) {
	a := newTestDriver(t, t.TempDir(), Options{})
	must(t, a.Create("base", "", nil))
	must(t, a.CreateReadWrite("box", "base", nil))
	drivers := []*Driver{a}
	for range 3 {
		drivers = append(drivers, openTestDriver(t, a.home, Options{}))
	}
	var wg sync.WaitGroup
	for g, d := range drivers {
		for worker := range 2 {
			wg.Go(func() {
				for range 15 {
					path, err := d.Get("box", "")
					if err != nil {
						t.Errorf("driver %d: %v", g, err)
						return
					}
					name := path + "/" + sizeName(g*2+worker)
					err = errors.Join(os.WriteFile(name, []byte("x"), 0o600), os.Remove(name), d.Put("box"))
					if err != nil {
						t.Errorf("driver %d: %v", g, err)
						return
					}
				}
			})
		}
	}
	wg.Wait()
	wantErr(t, a.Put("box"), ErrNotMounted)
}

// TestCleanupHandsOver: after Cleanup what is mounted is anybody's, as if the process had ended: a
// command that mounts and one that unmounts may be one program.
func TestCleanupHandsOver(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	path, err := d.Get("box", "")
	must(t, err)
	next := openTestDriver(t, d.home, Options{})
	wantErr(t, next.Put("box"), ErrNotMounted)
	must(t, d.Cleanup())
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the mount is gone: %v", err)
	}
	must(t, next.Put("box"))
	must(t, d.Put("box")) // its count is still there, the mount is not
	wantErr(t, d.Put("box"), ErrNotMounted)

	// Used on, it counts as before.
	_, err = d.Get("box", "")
	must(t, err)
	must(t, d.Cleanup())
	_, err = d.Get("box", "")
	must(t, err)
	wantErr(t, next.Put("box"), ErrNotMounted)
	must(t, d.Put("box"))
	must(t, d.Put("box"))
}

// TestApplyLeftMount: a diff is applied to a layer that a dead process has left mounted. What is seen there
// afterwards, by whoever adopts the mount, is what was applied.
func TestApplyLeftMount(t *testing.T) {
	tar1 := makeTar(t, file("dir/", ""), file("dir/name", "one"), file("name", "one"))
	tar2 := makeTar(t, file("dir/", ""), file("dir/name", "two"), file("name", "two"), file("new", "two"))
	for name, c := range map[string]struct {
		fails bool // the dead process was about to apply
		want  string
	}{"whole": {false, "two"}, "incomplete": {true, "two"}} {
		t.Run(name, func(t *testing.T) {
			home := filepath.Join(t.TempDir(), "home")
			d := newTestDriver(t, home, Options{})
			apply(t, d, "base", "", makeTar(t, file("name", "base")))
			must(t, d.CreateReadWrite("box", "base", nil))
			if !c.fails {
				_, err := d.ApplyDiff("box", "base", bytes.NewReader(tar1))
				must(t, err)
			}
			path, err := d.Get("box", "")
			must(t, err)
			for _, name := range []string{"name", "new", "dir/name"} { // so that the kernel remembers
				_, _ = os.ReadFile(filepath.Join(path, name))
			}
			if c.fails {
				if _, err := d.ApplyDiff("box", "base", bytes.NewReader(tar1[:700])); err == nil {
					t.Fatal("half a tar was applied")
				}
			}
			must(t, d.Cleanup()) // its end: the mount stays

			d = openTestDriver(t, home, Options{})
			_, err = d.ApplyDiff("box", "base", bytes.NewReader(tar2))
			must(t, err)
			path, err = d.Get("box", "")
			must(t, err)
			for _, name := range []string{"name", "new", "dir/name"} {
				if got, err := os.ReadFile(filepath.Join(path, name)); err != nil || string(got) != c.want {
					t.Errorf("%s holds %q, %v", name, got, err)
				}
			}
			must(t, os.WriteFile(filepath.Join(path, "name"), []byte("three"), 0o644))
			must(t, os.RemoveAll(filepath.Join(path, "dir")))
			for err = d.Put("box"); err == nil; err = d.Put("box") {
				continue // what was adopted counts as a use
			}
			wantErr(t, err, ErrNotMounted)
			changes, err := d.Changes("box", "base")
			must(t, err)
			if got := fmt.Sprint(changes); got != "[C /name A /new]" {
				t.Errorf("changes are %s", got)
			}
		})
	}
}
