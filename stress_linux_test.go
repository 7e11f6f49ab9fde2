package overlay2

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// stressLayers is the number of layers that the users below share.
const stressLayers = 16

// stressHome makes a home with layers box0, box1, ... over two others.
func stressHome(t *testing.T) *Driver {
	d := newTestDriver(t, t.TempDir(), Options{})
	deepChain(t, d, 2)
	for i := range stressLayers {
		must(t, d.CreateReadWrite(fmt.Sprint("box", i), "layer1", nil))
	}
	return d
}

// useLayers gets, writes, reads, views and puts layers in an order of the worker's own, and returns the first thing
// that is not as it must be.
func useLayers(d *Driver, worker string, first, rounds int) error {
	for i := range rounds {
		id := fmt.Sprint("box", (first+7*i)%stressLayers)
		path, err := d.Get(id, "")
		if err != nil {
			return err
		}
		name := filepath.Join(path, fmt.Sprint(worker, "-", i))
		if err := os.WriteFile(name, []byte(name), 0o600); err != nil {
			return errors.Join(err, d.Put(id))
		}
		data, err := os.ReadFile(name)
		if err == nil && string(data) != name {
			err = fmt.Errorf("%s holds %q", name, data)
		}
		if _, below := os.Stat(path + "/f0"); below != nil {
			err = errors.Join(err, below)
		}
		if removed := d.Remove(id); !errors.Is(removed, ErrLayerInUse) {
			err = errors.Join(err, fmt.Errorf("remove of a layer in use: %w", removed))
		}
		if err := errors.Join(err, os.Remove(name), d.Put(id)); err != nil {
			return err
		}
		m, err := d.Mount("layer1", MountOpts{})
		if err != nil {
			return err
		}
		if err := m.Close(); err != nil {
			return err
		}
	}
	return nil
}

// wantIdle fails the test unless nothing is mounted or used, all can be removed and no state stays.
func wantIdle(t *testing.T, d *Driver) {
	t.Helper()
	must(t, sys.MountPoints(func(m sys.MountPoint) {
		if strings.HasPrefix(m.Path, d.home+"/") {
			t.Errorf("mounted: %s", m.Path)
		}
	}))
	for i := range stressLayers {
		id := fmt.Sprint("box", i)
		wantErr(t, d.Put(id), ErrNotMounted)
		if names, err := os.ReadDir(d.home + "/" + id + "/diff"); err != nil || len(names) > 0 {
			t.Errorf("%s holds %v %v", id, names, err)
		}
		must(t, d.Remove(id))
	}
	if len(d.layers.states) != 0 {
		t.Errorf("%d states stay", len(d.layers.states))
	}
}

// TestStressGoroutines: 64 users of 16 layers in one process.
func TestStressGoroutines(t *testing.T) {
	d := stressHome(t)
	var wg sync.WaitGroup
	for g := range 64 {
		wg.Go(func() {
			if err := useLayers(d, fmt.Sprint("g", g), g, 12); err != nil {
				t.Errorf("goroutine %d: %v", g, err)
			}
		})
	}
	wg.Wait()
	wantIdle(t, d)
}

// stressEnv tells the test binary which home it is to use as one of several processes.
const stressEnv = "OVERLAY2_TEST_STRESS_HOME"

// TestStressProcesses: four processes on one home, the same layers and different ones; one of them ends with
// all of its uses still counted, which the next to come takes over.
func TestStressProcesses(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	if home := os.Getenv(stressEnv); home != "" {
		stressProcess(t, home)
		return
	}
	d := stressHome(t)
	var wg sync.WaitGroup
	for p := range 4 {
		wg.Go(func() {
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestStressProcesses$", "-test.v")
			cmd.Env = append(os.Environ(), stressEnv+"="+d.home)
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), "--- PASS") {
				t.Errorf("process %d: %v\n%s", p, err, out)
			}
		})
	}
	if err := useLayers(d, "parent", 3, 20); err != nil {
		t.Error(err)
	}
	wg.Wait()
	wantIdle(t, d)
	// One that ends without Put.
	must(t, d.CreateReadWrite("left", "layer1", nil))
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestStressLeaves$", "-test.v")
	cmd.Env = append(os.Environ(), stressEnv+"="+d.home)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Fatalf("%v\n%s", err, out)
	}
	if mounted, err := mountinfo.Mounted(d.home + "/left/merged"); err != nil || !mounted {
		t.Fatalf("mounted: %v %v", mounted, err)
	}
	path, err := d.Get("left", "")
	must(t, err)
	if _, err := os.Stat(path + "/by-another"); err != nil {
		t.Error(err)
	}
	must(t, errors.Join(d.Put("left"), d.Put("left")))
	wantErr(t, d.Put("left"), ErrNotMounted)
	must(t, d.Remove("left"))
}

func stressProcess(t *testing.T, home string) {
	d, err := New(home, Options{})
	must(t, err)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			if err := useLayers(d, fmt.Sprint("p", os.Getpid(), "-", g), g*5, 10); err != nil {
				t.Errorf("goroutine %d: %v", g, err)
			}
		})
	}
	wg.Wait()
	must(t, d.Cleanup())
}

// TestStressLeaves is a process that ends with a layer mounted; TestStressProcesses runs it.
func TestStressLeaves(t *testing.T) {
	home := os.Getenv(stressEnv)
	if home == "" {
		return
	}
	d, err := New(home, Options{})
	must(t, err)
	path, err := d.Get("left", "")
	must(t, err)
	must(t, os.WriteFile(path+"/by-another", nil, 0o600))
}

// TestMountHeldElsewhere: a layer's mount that another mount namespace has a copy of, in use there,
// makes neither Put nor Remove fail, and the name can be used again.
func TestMountHeldElsewhere(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "cmd:unshare", "cmd:sh")
	d := newTestDriver(t, t.TempDir(), Options{})
	deepChain(t, d, 2)
	for range 2 {
		must(t, d.CreateReadWrite("box", "layer1", nil))
		path, err := d.Get("box", "")
		must(t, err)
		must(t, os.WriteFile(path+"/f", nil, 0o600))
		other := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", `cd "$0" && exec 3<f && echo ready && read line`, path)
		in, err := other.StdinPipe()
		must(t, err)
		outR, err := other.StdoutPipe()
		must(t, err)
		must(t, other.Start())
		buf := make([]byte, 6)
		if n, err := outR.Read(buf); err != nil || string(buf[:n]) != "ready\n" {
			t.Errorf("%q %v", buf[:n], err)
		}
		must(t, d.Put("box"))
		if _, err := os.Lstat(path); !errors.Is(err, unix.ENOENT) {
			t.Errorf("merged stays: %v", err)
		}
		must(t, d.Remove("box"))
		must(t, d.Cleanup())
		if names, err := os.ReadDir(d.home + "/staging"); err != nil || len(names) > 0 {
			t.Errorf("not deleted: %v %v", names, err)
		}
		_ = in.Close()
		_ = other.Wait() // its read ends with an error
	}
}
