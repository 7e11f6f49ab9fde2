package overlay2

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// processesEnv is the home of the processes that TestProcesses starts, processesTimeEnv how long they work.
const (
	processesEnv     = "OVERLAY2_TEST_PROCESSES"
	processesTimeEnv = "OVERLAY2_TEST_DURATION"
)

// processTar is the content of a layer: it follows from the ID alone, so that every process knows it.
func processTar(t testing.TB, id string) []byte {
	return makeTar(t, file("of-"+id, id), file("name", id), file("dir/", ""), file("dir/big", strings.Repeat(id, 3000)))
}

// TestProcessesWorker is one of the processes: 8 goroutines that make, fill, mount, read and remove layers, which the
// other processes do as well with the same IDs.
func TestProcessesWorker(t *testing.T) {
	home := os.Getenv(processesEnv)
	if home == "" {
		return // run as a test of its own, it has nothing to do
	}
	d, err := New(home, quietOptions(DurabilityBackground))
	must(t, err)
	length, err := time.ParseDuration(os.Getenv(processesTimeEnv))
	must(t, err)
	end := time.Now().Add(length)
	var wg sync.WaitGroup
	var busy processLocks
	for range 8 {
		wg.Go(func() {
			for time.Now().Before(end) && !t.Failed() {
				// "3" is a layer, "3.1" one on it, "3.1.2" one on that.
				id := strconv.Itoa(rand.IntN(4))
				for rand.IntN(3) > 0 && len(id) < 5 {
					id += "." + strconv.Itoa(rand.IntN(3))
				}
				if err := processStep(t, d, &busy, id); err != nil {
					t.Errorf("%s: %v", id, err)
				}
			}
		})
	}
	wg.Wait()
	must(t, d.Cleanup())
}

// processParent returns the parent of a layer.
func processParent(id string) string {
	if i := strings.LastIndexByte(id, '.'); i > 0 {
		return id[:i]
	}
	return ""
}

// processLocks keep the goroutines of one process from reading a layer through its mount while they fill it
// through that: whoever has got a layer and applies a diff to it sees it grow, as ApplyDiff says. What
// another process has got cannot be filled.
type processLocks struct{ byID sync.Map }

func (l *processLocks) of(id string) *sync.RWMutex {
	m, _ := l.byID.LoadOrStore(id, new(sync.RWMutex))
	return m.(*sync.RWMutex)
}

// processStep makes one call. What others may have done to the layer meanwhile is no error.
func processStep(t *testing.T, d *Driver, busy *processLocks, id string) (err error) {
	parent := processParent(id)
	fill := func() error {
		m := busy.of(id)
		m.Lock()
		defer m.Unlock()
		return errOf(d.ApplyDiff(id, parent, bytes.NewReader(processTar(t, id))))
	}
	switch rand.IntN(7) {
	case 0, 1:
		if err = d.Create(id, parent, nil); err == nil {
			err = fill()
		}
	case 2:
		err = fill()
	case 3, 4:
		m := busy.of(id)
		m.RLock()
		defer m.RUnlock()
		err = processRead(d, id)
	case 5:
		err = d.Remove(id)
	case 6:
		err = processDiff(d, id, parent)
	}
	for _, expected := range []error{ErrLayerExists, ErrLayerNotFound, ErrLayerInUse, ErrIncomplete} {
		if errors.Is(err, expected) {
			return nil
		}
	}
	return err
}

// processDiff reads a layer's diff slowly: it is whole, or nothing yet, whoever removes and fills the layer meanwhile.
func processDiff(d *Driver, id, parent string) error {
	diff, err := d.Diff(id, parent)
	if err != nil {
		return err
	}
	got := map[string]string{}
	err = func() error {
		for tr := tar.NewReader(diff); ; {
			h, err := tr.Next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			data, err := io.ReadAll(tr)
			if err != nil {
				return err
			}
			got[h.Name] = string(data)
			time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
		}
	}()
	if err := errors.Join(err, diff.Close()); err != nil {
		return fmt.Errorf("diff: %w", err)
	}
	if len(got) > 1 && (got["name"] != id || got["dir/big"] != strings.Repeat(id, 3000) || got["of-"+id] != id) {
		return fmt.Errorf("diff of %s has %d names, name holds %q", id, len(got), got["name"])
	}
	return nil
}

// processRead mounts a layer and compares what it sees: whole layers only, of the whole chain.
func processRead(d *Driver, id string) error {
	path, err := d.Get(id, "")
	if err != nil {
		return err
	}
	err = processVerify(path, id)
	return errors.Join(err, d.Put(id))
}

func processVerify(path, id string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	name, err := os.ReadFile(filepath.Join(path, "name"))
	if errors.Is(err, os.ErrNotExist) && len(entries) == 0 {
		return nil // made, and not filled yet
	}
	if err != nil {
		return err
	}
	// A layer that was made and not filled shows its parent.
	if string(name) != id && !strings.HasPrefix(id, string(name)+".") {
		return fmt.Errorf("layer %s holds %q", id, name)
	}
	if data, err := os.ReadFile(filepath.Join(path, "dir", "big")); err != nil || string(data) != strings.Repeat(string(name), 3000) {
		return fmt.Errorf("layer %s: half of %s: %d bytes: %w", id, name, len(data), err)
	}
	if data, err := os.ReadFile(filepath.Join(path, "of-"+string(name))); err != nil || string(data) != string(name) {
		return fmt.Errorf("layer %s: of-%s holds %q: %w", id, name, data, err)
	}
	return nil
}

// TestProcesses: four processes with eight goroutines each work on one home, with the same layers; again and again one is
// killed and another takes its place. No reader sees half a layer, and in the end the home is in order.
func TestProcesses(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	exe, err := os.Executable()
	must(t, err)
	home := overlaytest.MountFS(t, overlaytest.FS{Name: "ext4"})
	length := os.Getenv(processesTimeEnv)
	if length == "" {
		length = "5s"
	}
	total, err := time.ParseDuration(length)
	must(t, err)
	end := time.Now().Add(total)
	var wg sync.WaitGroup
	var mu sync.Mutex
	kills := 0
	for n := range 4 {
		wg.Go(func() {
			for time.Now().Before(end) {
				cmd := exec.Command(exe, "-test.run=^TestProcessesWorker$")
				cmd.Env = append(os.Environ(), processesEnv+"="+home, processesTimeEnv+"="+time.Until(end).String())
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				if err := cmd.Start(); err != nil {
					t.Error(err)
					return
				}
				var timer *time.Timer
				if n == 0 { // the one that is killed
					timer = time.AfterFunc(time.Duration(200+rand.IntN(1000))*time.Millisecond, func() { _ = cmd.Process.Kill() })
				}
				err := cmd.Wait()
				killed := n == 0 && !timer.Stop()
				if killed {
					mu.Lock()
					kills++
					mu.Unlock()
				} else if err != nil {
					t.Errorf("%v: %s", err, out.String())
					return
				}
			}
		})
	}
	wg.Wait()
	verifyProcesses(t, home)
	t.Logf("%d kills", kills)
}

// verifyProcesses looks at the home when all processes have ended, and removes all layers.
func verifyProcesses(t *testing.T, home string) {
	t.Helper()
	d, err := New(home, quietOptions(DurabilityBackground))
	must(t, err)
	names := homeNames(t, d)
	for _, id := range names {
		if err := processRead(d, id); err != nil && !errors.Is(err, ErrIncomplete) {
			t.Errorf("%s: %v", id, err)
		}
		putAll(t, d, id)
	}
	problems, err := d.Check()
	must(t, err)
	for _, p := range problems {
		if !errors.Is(p.Err, ErrIncomplete) {
			t.Errorf("check: %v", p)
		}
	}
	for i := len(names) - 1; i >= 0; i-- { // children come after their parents
		must(t, d.Remove(names[i]))
	}
	must(t, d.Cleanup())
	wantEmptyHome(t, d)
}
