package overlay2

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// getKept gets and puts a layer until it is kept.
func getKept(t *testing.T, d *Driver, id string) {
	t.Helper()
	for range 5 {
		getPut(t, d, id, 1)
		if isKept(d, id) {
			return
		}
	}
	t.Fatalf("%s is not kept", id)
}

func isKept(d *Driver, id string) bool {
	d.kept.mu.Lock()
	defer d.kept.mu.Unlock()
	return d.kept.m[id] != nil
}

// keptHome returns a Driver with a chain of three layers, and boxes above it that are kept.
func keptHome(t *testing.T, boxes ...string) *Driver {
	t.Helper()
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	d, err := New(t.TempDir(), quietOptions(DurabilityOff))
	must(t, err)
	t.Cleanup(func() {
		must(t, d.Cleanup())
		if len(d.kept.m) != 0 || d.kept.n != 0 {
			t.Errorf("after Cleanup %d of %d are kept", len(d.kept.m), d.kept.n)
		}
	})
	deepChain(t, d, 3)
	for _, id := range boxes {
		must(t, d.CreateReadWrite(id, "layer2", nil))
		getKept(t, d, id)
	}
	return d
}

// TestKeptLayerUse: what is written through a layer that is kept is there the next time, for this Driver and for others.
func TestKeptLayerUse(t *testing.T) {
	d := keptHome(t, "box")
	for i := range 5 {
		path, err := d.Get("box", "")
		must(t, err)
		must(t, os.WriteFile(fmt.Sprintf("%s/%d", path, i), nil, 0o644))
		must(t, os.Chmod(path, 0o750+os.FileMode(i))) // of the diff, which is watched by its parent
		must(t, d.Put("box"))
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the mount point after Put: %v", err)
		}
	}
	other, err := New(d.home, quietOptions(DurabilityOff))
	must(t, err)
	path, err := other.Get("box", "")
	must(t, err)
	again, err := d.Get("box", "") // shared, and kept
	must(t, err)
	names, err := os.ReadDir(again)
	must(t, err)
	if again != path || len(names) != 9 { // and those of deepChain
		t.Errorf("%s and %s with %v", path, again, names)
	}
	must(t, d.Put("box"))
	if _, err := os.ReadDir(path + "/."); err != nil {
		t.Error(err)
	}
	if err := d.Put("box"); !errors.Is(err, ErrNotMounted) {
		t.Errorf("one Put too many: %v", err)
	}
	must(t, other.Put("box"))
	must(t, other.Cleanup())
}

// TestKeptLayerBound: no more are open than may be, in use or not.
func TestKeptLayerBound(t *testing.T) {
	d := keptHome(t)
	d.kept.max = 2
	ids := []string{"a", "b", "c", "d"}
	for _, id := range ids {
		must(t, d.CreateReadWrite(id, "layer2", nil))
	}
	getKept(t, d, "a")
	before := openDescriptors(t) - 2
	for range 4 {
		for _, id := range ids {
			getPut(t, d, id, 3)
		}
		for _, id := range ids {
			_, err := d.Get(id, "")
			must(t, err)
		}
		for _, id := range ids {
			must(t, d.Put(id))
		}
	}
	if n := openDescriptors(t) - before; len(d.kept.m) > 2 || n > 2*2 {
		t.Errorf("%d kept, %d descriptors", len(d.kept.m), n)
	}
	for _, id := range ids {
		must(t, d.Remove(id))
	}
	if len(d.kept.m) > 0 || d.kept.n > 0 {
		t.Errorf("%d of %d kept of layers that are removed", len(d.kept.m), d.kept.n)
	}
}

func openDescriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(fds)
}

// TestKeptLayerOthers: another Driver removes the layer, makes it anew, fills it, or mounts it.
func TestKeptLayerOthers(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(t *testing.T, other *Driver)
		want error
	}{
		"remove": {func(t *testing.T, other *Driver) { must(t, other.Remove("box")) }, ErrLayerNotFound},
		"make anew": {func(t *testing.T, other *Driver) {
			must(t, other.Remove("box"))
			must(t, other.CreateReadWrite("box", "layer1", nil))
		}, nil},
		"child of it": {func(t *testing.T, other *Driver) { must(t, other.Create("child", "box", nil)) }, nil},
		"remove parent": {func(t *testing.T, other *Driver) {
			if err := other.Remove("layer2"); !errors.Is(err, ErrLayerInUse) {
				t.Error(err)
			}
		}, nil},
		"rebase": {func(t *testing.T, other *Driver) { must(t, other.Rebase("box", "layer0")) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			d := keptHome(t, "box")
			other, err := New(d.home, quietOptions(DurabilityOff))
			must(t, err)
			c.do(t, other)
			for range 4 {
				path, err := d.Get("box", "")
				if !errors.Is(err, c.want) {
					t.Fatalf("got %v, want %v", err, c.want)
				}
				if err != nil {
					continue
				}
				want, err := other.Get("box", "")
				must(t, err)
				var st, wantSt unix.Stat_t
				must(t, errors.Join(unix.Stat(path, &st), unix.Stat(want, &wantSt)))
				if path != want || st.Dev != wantSt.Dev {
					t.Errorf("%s on %d, %s on %d", path, st.Dev, want, wantSt.Dev)
				}
				must(t, other.Put("box"))
				must(t, d.Put("box"))
			}
			must(t, other.Cleanup())
			if c.want != nil {
				stays := isKept(d, "box")
				must(t, d.Remove("box"))
				if stays || isKept(d, "box") {
					t.Error("it is kept after its removal")
				}
			}
			if problems, err := d.Check(); err != nil || len(problems) > 0 {
				t.Error(problems, err)
			}
		})
	}
}

// TestKeptLayerCovered: a home that something else is mounted over is not taken for the one that was watched, and a use
// that began before ends beneath it.
func TestKeptLayerCovered(t *testing.T) {
	d := keptHome(t, "box")
	cover := func() { must(t, unix.Mount("none", d.home, "tmpfs", 0, "")) }
	uncover := func() { must(t, unix.Unmount(d.home, 0)) }
	cover()
	if _, err := d.Get("box", ""); !errors.Is(err, ErrLayerNotFound) {
		t.Errorf("Get: %v", err)
	}
	uncover()
	getKept(t, d, "box")
	path, err := d.Get("box", "")
	must(t, err)
	cover()
	must(t, d.Put("box"))
	uncover()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("merged: %v", err)
	}
	getPut(t, d, "box", 2)
}

// TestKeptLayerRemovedMeanwhile: a layer that another process removes while Remove waits for its lock is not kept on.
func TestKeptLayerRemovedMeanwhile(t *testing.T) {
	d := keptHome(t, "box")
	l, err := openLayer(d.home, "box")
	must(t, err)
	must(t, sys.Flock(l.fd, unix.LOCK_EX))
	done := make(chan error)
	go func() { done <- d.Remove("box") }()
	time.Sleep(100 * time.Millisecond) // if it has not begun to wait by then, the test is of something else, and passes
	must(t, os.Rename(d.home+"/box", d.home+"/staging/trash-box"))
	l.close()
	must(t, <-done)
	if isKept(d, "box") {
		t.Error("it is kept")
	}
}

// TestKeptLayerHandOver: Cleanup ends the uses of layers that are kept, too, and what is mounted can be put by anybody.
func TestKeptLayerHandOver(t *testing.T) {
	d := keptHome(t, "box", "other")
	_, err := d.Get("box", "")
	must(t, err)
	must(t, d.Cleanup())
	other, err := New(d.home, quietOptions(DurabilityOff))
	must(t, err)
	must(t, other.Put("box"))
	must(t, other.Cleanup())
	must(t, d.Put("box")) // it was counted here, too
}

// TestKeptLayerTogether: three Drivers get and put the same few layers, which they keep, while these are removed and made anew now
// and then, or have a child: who has got one has it mounted, with all that is below, until his Put.
func TestKeptLayerTogether(t *testing.T) {
	d := keptHome(t)
	rounds := 400
	if testing.Short() {
		rounds = 60
	}
	boxes := []string{"a", "b", "c"}
	for _, id := range boxes {
		must(t, d.CreateReadWrite(id, "layer2", nil))
	}
	drivers := []*Driver{d}
	for range 2 {
		other, err := New(d.home, quietOptions(DurabilityOff))
		must(t, err)
		drivers = append(drivers, other)
	}
	var got, gone atomic.Int64
	use := func(d *Driver, id string) error {
		path, err := d.Get(id, "")
		if errors.Is(err, ErrLayerNotFound) {
			gone.Add(1)
			return nil
		}
		if err != nil {
			return err
		}
		got.Add(1)
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil || st.Type != unix.OVERLAYFS_SUPER_MAGIC {
			return fmt.Errorf("%s: of type %x: %w", path, st.Type, err)
		}
		for i := range 3 {
			if _, err := os.Lstat(fmt.Sprintf("%s/f%d", path, i)); err != nil {
				return err
			}
		}
		return d.Put(id)
	}
	remake := func(d *Driver, id string, n int) error {
		if n%2 == 0 { // it is read-only from then on
			if err := d.Create(id+"-child", id, nil); err != nil && !errors.Is(err, ErrLayerNotFound) && !errors.Is(err, ErrLayerExists) {
				return err
			}
			if err := d.Remove(id + "-child"); err != nil {
				return err
			}
		}
		if err := d.Remove(id); err != nil {
			if errors.Is(err, ErrLayerInUse) {
				return nil
			}
			return err
		}
		if err := d.CreateReadWrite(id, "layer2", nil); err != nil && !errors.Is(err, ErrLayerExists) {
			return err
		}
		return nil
	}
	var all sync.WaitGroup
	for i, d := range drivers {
		for j := range 4 {
			all.Go(func() {
				random := rand.New(rand.NewPCG(uint64(i), uint64(j)))
				for n := range rounds {
					id := boxes[random.IntN(len(boxes))]
					err := use(d, id)
					if err == nil && random.IntN(25) == 0 {
						err = remake(d, id, n)
					}
					if err != nil {
						t.Errorf("driver %d, round %d: %s: %v", i, n, id, err)
						return
					}
				}
			})
		}
	}
	all.Wait()
	t.Logf("%d Gets, %d of layers that were not there", got.Load(), gone.Load())
	for _, d := range drivers[1:] {
		must(t, d.Cleanup())
	}
	checkEmpty(t, d)
	for _, id := range boxes {
		must(t, d.Remove(id))
	}
}

// TestWatchOwn: a layer that is looked at while something changes there is not kept, one that another layer has below it is not watched twice.
func TestWatchOwn(t *testing.T) {
	d := keptHome(t, "box")
	must(t, d.CreateReadWrite("new", "layer2", nil))
	watchOwn := func(id string) *watch {
		l, err := openLayer(d.home, id)
		must(t, err)
		defer l.close()
		one := d.known.watchOwn(l.fd)
		if one != nil {
			t.Cleanup(func() { d.known.unwatch(one) })
		}
		return one
	}
	for name, want := range map[string]bool{mergedName: true, committedName: false, incompleteName: false, "anything": false} {
		one := watchOwn("new")
		if one == nil {
			t.Fatal("not watched")
		}
		path := d.home + "/new/" + name
		must(t, os.Mkdir(path, 0o700))
		if ok := d.known.settleOwn(one); ok != want {
			t.Errorf("%s was made: settled %v, want %v", name, ok, want)
		}
		must(t, os.Remove(path))
		d.known.unwatch(one)
	}
	for _, want := range []bool{true, false} {
		l, err := openLayer(d.home, "new")
		must(t, err)
		d.kept.seen("new")
		k := d.beginKeeping(l)
		u, err := l.joinUse()
		must(t, err)
		k.own = "LINK"
		k.ident, err = sys.IdentFd(u.fd)
		must(t, err)
		if !want {
			must(t, os.Mkdir(d.home+"/new/"+incompleteName, 0o700))
		}
		if ok := d.keep(k, l, u); ok != want {
			t.Errorf("kept %v, want %v", ok, want)
		}
		d.dropKept(k)
		if !want {
			u.drop()
			l.close()
		}
	}
	must(t, os.Remove(d.home+"/new/"+incompleteName))
	if watchOwn("layer2") != nil {
		t.Error("layer2 is watched twice")
	}
	getKept(t, d, "box")
}
