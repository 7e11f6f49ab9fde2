package overlay2

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// TestForkSameTick makes a file, a layer over the file's and a change of the file in it within one tick of the clock,
// and compares with a sister layer: the file looks untouched by its number and times, and is Modified.
func TestForkSameTick(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		d := newTestDriver(t, dir, Options{})
		alike := 0
		for i := range 25 {
			low, up, sister := fmt.Sprint("low", i), fmt.Sprint("up", i), fmt.Sprint("sister", i)
			must(t, d.CreateReadWrite(low, "", nil))
			must(t, os.WriteFile(filepath.Join(d.home, low, diffName, "f"), []byte("aaaa"), 0o644))
			must(t, os.WriteFile(filepath.Join(d.home, low, diffName, "untouched"), []byte("aaaa"), 0o644))
			must(t, d.CreateReadWrite(up, low, nil))
			path, put := get(t, d, up)
			f, err := os.OpenFile(filepath.Join(path, "f"), os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteString("bbbb")
			must(t, err)
			must(t, f.Close())
			must(t, d.CreateReadWrite(sister, low, nil))
			other, putOther := get(t, d, sister)
			var a, b unix.Stat_t
			must(t, unix.Lstat(filepath.Join(path, "f"), &a))
			must(t, unix.Lstat(filepath.Join(other, "f"), &b))
			if a.Ino == b.Ino && a.Ctim == b.Ctim && a.Mtim == b.Mtim {
				alike++
			}
			for _, pair := range [][2]string{{up, sister}, {sister, up}} {
				changes, err := d.Changes(pair[0], pair[1])
				must(t, err)
				if len(changes) != 1 || changes[0] != (archive.Change{Path: "/f", Kind: archive.Modified}) {
					t.Errorf("%q: %v", pair, changes)
				}
			}
			since, err := d.forkedAt(up, sister)
			must(t, err)
			if made := time.Unix(b.Ctim.Unix()); !since.IsZero() && since.Before(made) {
				t.Errorf("they differ since %v, and the file below both is of %v", since, made)
			}
			put()
			putOther()
		}
		t.Logf("%d of 25 looked untouched", alike)
	})
}

// startPrograms starts programs all the time, until stop: between fork and exec they have copies of all descriptors.
func startPrograms() (stop func()) {
	var ended atomic.Bool
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			for !ended.Load() {
				_ = exec.Command("/bin/true").Run() // whether it runs is not what matters
			}
		})
	}
	return func() {
		ended.Store(true)
		all.Wait()
	}
}

// TestForkRebase: a layer that nobody uses is not taken for one in use while the process starts programs.
func TestForkRebase(t *testing.T) {
	d := keptHome(t)
	must(t, d.CreateReadWrite("box", "layer2", nil))
	defer startPrograms()()
	for i := range 200 {
		getPut(t, d, "box", 1)
		must(t, d.Rebase("box", []string{"layer1", "layer2"}[i%2]))
	}
}

// TestForkHomeBind: nor is the home taken for one that another Driver uses where a child is just about to close its copy of a
// descriptor.
func TestForkHomeBind(t *testing.T) {
	home := sharedDir(t) + "/home"
	d, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	wantBound(t, home, 1)
	fd, err := sys.OpenRoot(home)
	must(t, err)
	closed := make(chan error)
	go func() {
		time.Sleep(5 * time.Millisecond)
		closed <- sys.Close(fd)
	}()
	must(t, d.Cleanup())
	must(t, <-closed)
	wantBound(t, home, 0)
}
