package overlay2

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// faultsEnv is the directory that TestFaultsWorker works in, faultsAllEnv makes it try all errors at all calls.
const (
	faultsEnv    = "OVERLAY2_TEST_FAULTS"
	faultsAllEnv = "OVERLAY2_TEST_FAULTS_ALL"
)

// faultErrnos are what a full, broken or exhausted machine answers.
var faultErrnos = []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EIO, unix.EMFILE, unix.ENFILE, unix.ENOMEM}

// TestFaults lets one system call after the other of each call of a Driver fail. The call returns that error, or does without
// what failed; nothing stays open or mounted, other layers are untouched, the layer can be removed,
// and the next call works. With OVERLAY2_TEST_FAULTS_ALL=1 each of them fails with each error.
func TestFaults(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "seccomp")
	overlaytest.NoLeaks(t)
	exe, err := os.Executable()
	must(t, err)
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "ext4"})
	cmd := exec.Command(exe, "-test.run=^TestFaultsWorker$", "-test.v", "-test.timeout=3h")
	cmd.Env = append(os.Environ(), faultsEnv+"="+dir,
		"GODEBUG=containermaxprocs=0,updatemaxprocs=0") // the runtime's own reads cannot be stopped safely
	if os.Getenv(faultsAllEnv) != "" { // an hour: to be seen while it goes on
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		must(t, cmd.Run())
		return
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	logCounts(t, out)
}

// faults makes the at-th system call of the process fail while it is armed.
type faults struct {
	at, calls atomic.Int64
	errno     atomic.Uint32
	failed    atomic.Pointer[string] // the call that failed
}

func (f *faults) decide(call string) unix.Errno {
	at := f.at.Load()
	if at == 0 || f.calls.Add(1) != at {
		return 0
	}
	f.failed.Store(&call)
	return unix.Errno(f.errno.Load())
}

// arm makes the at-th call from now on fail.
func (f *faults) arm(at int64, errno unix.Errno) {
	f.calls.Store(0)
	f.failed.Store(nil)
	f.errno.Store(uint32(errno))
	f.at.Store(at)
}

// disarm returns the name of the call that has failed, "" if there were fewer calls.
func (f *faults) disarm() string {
	f.at.Store(0)
	if s := f.failed.Load(); s != nil {
		return *s
	}
	return ""
}

// TestFaultsWorker is the process that TestFaults starts.
func TestFaultsWorker(t *testing.T) {
	dir := os.Getenv(faultsEnv)
	if dir == "" {
		return // run as a test of its own, it has nothing to do
	}
	f := &faults{}
	overlaytest.Intercept(t, overlaytest.Failing(), f.decide)
	all := os.Getenv(faultsAllEnv) != ""
	removeParent := func(d *Driver) error {
		if err := d.Remove("top"); err == nil || !errors.Is(err, ErrLayerInUse) {
			return err
		}
		return nil
	}
	for n, step := range append(steps(t),
		step{
			name:    "remove-parent",
			prepare: func(t *testing.T, d *Driver) { must(t, d.CreateReadWrite("new", "top", nil)) },
			run:     removeParent, before: treeTop, after: treeTop,
		},
		step{
			name: "remove-parent-unsealed",
			prepare: func(t *testing.T, d *Driver) {
				must(t, d.CreateReadWrite("new", "top", nil))
				for _, id := range []string{"base", "top", "box"} {
					must(t, errors.Join(ignoreAbsent(os.RemoveAll(filepath.Join(d.home, id, childrenName))), ignoreAbsent(os.Remove(filepath.Join(d.home, id, listedName)))))
				}
			},
			run: removeParent, before: treeTop, after: treeTop,
		},
	) {
		t.Run(step.name, func(t *testing.T) {
			w := faultsWorker{f: f, s: setupSteps(t, filepath.Join(dir, step.name)), step: step}
			errnos, stride := len(faultErrnos), 1
			if !all { // each call of recovery, and the same others each time
				errnos = 1
				switch {
				case step.opens:
					stride = 11 // hundreds of calls, most of which find out what the kernel can do
				case step.name != "recover":
					stride = 3
				}
			}
			for first := range errnos {
				next := n + first
				for at := int64(1 + n%stride); w.fault(t, at, faultErrnos[next%len(faultErrnos)]); at += int64(stride) {
					if !all {
						next++
					}
				}
			}
			t.Logf("%d faults in %s, %d of them returned", w.faults, step.name, w.returned)
		})
	}
}

// faultsWorker lets calls of one step fail.
type faultsWorker struct {
	f                *faults
	s                *stepTest
	step             step
	faults, returned int
}

// fault takes the step while its at-th system call fails. It returns false if there were fewer.
func (w *faultsWorker) fault(t *testing.T, at int64, errno unix.Errno) bool {
	t.Helper()
	if w.step.prepare != nil {
		d, err := New(w.s.home, quietOptions(DurabilityBackground))
		must(t, err)
		w.step.prepare(t, d)
		must(t, d.Cleanup())
	}
	incomplete := w.step.incomplete
	fds, mounts := openFDs(t), mountCount(t, w.s.home)
	d, err := New(w.s.home, quietOptions(w.step.mode))
	if w.step.opens {
		must(t, w.reopen(t, d))
	}
	must(t, err)
	if w.step.begin != nil {
		w.step.begin(t, d)
	}
	w.f.arm(at, errno)
	if w.step.opens {
		d, err = New(w.s.home, quietOptions(w.step.mode))
	} else {
		err = w.step.run(d)
	}
	call := w.f.disarm()
	if call != "" {
		w.faults++
	}
	what := fmt.Sprintf("%s: call %d, %s: %v: %v", w.step.name, at, call, errno, err)
	if err != nil {
		w.returned++
		w.s.checkError(t, err, errno, what)
	}
	if d != nil {
		d.trash.wait()
		_ = d.Cleanup() // a sync that failed once fails again
		if strings.HasPrefix(w.step.name, "get") && err == nil {
			must(t, d.Put("new"))
		}
	}
	d, err2 := New(w.s.home, quietOptions(DurabilityBackground))
	if err2 != nil {
		t.Fatalf("%s: new: %v", what, err2)
	}
	d.trash.wait()
	allowed := []string{w.step.after}
	if strings.Contains(call, "sync") && w.step.mode == DurabilityBackground {
		w.step.incomplete = true // content that the disk has refused once is not trusted any more
		defer func(was bool) { w.step.incomplete = was }(incomplete)
	}
	if err != nil {
		allowed = append(append(allowed, w.step.before), w.step.between...)
	}
	state := w.s.verifyAfter(t, d, w.step, allowed...)
	if at%8 == 0 {
		w.s.verifyOthers(t, d)
	}
	if !t.Failed() {
		w.s.finish(t, d, w.step, state)
	}
	must(t, d.Cleanup())
	wantNoMore(t, w.s.home, fds, mounts)
	if t.Failed() {
		t.Fatal(what)
	}
	return call != ""
}

// reopen ends a Driver that was opened for nothing: the step is New.
func (w *faultsWorker) reopen(t *testing.T, d *Driver) error {
	t.Helper()
	if err := d.Cleanup(); err != nil || w.step.prepare == nil {
		return err
	}
	// It has dealt with what was prepared: once more.
	if err := d.Remove("new"); err != nil {
		return err
	}
	if err := d.Cleanup(); err != nil {
		return err
	}
	d, err := New(w.s.home, quietOptions(DurabilityBackground))
	if err != nil {
		return err
	}
	w.step.prepare(t, d)
	return d.Cleanup()
}

// wantNoMore fails the test if more is open or mounted than before, after some time.
func wantNoMore(t *testing.T, home string, fds []string, mounts int) {
	t.Helper()
	for deadline := time.Now().Add(6 * time.Second); ; time.Sleep(time.Millisecond) {
		now, mounted := openFDs(t), mountCount(t, home)
		if len(now) <= len(fds) && mounted <= mounts {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("open: %q, before: %q; %d mounts, before %d", now, fds, mounted, mounts)
			return
		}
		runtime.Gosched()
	}
}

func openFDs(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	fds := map[string]string{}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(target, "/proc/") {
			fds[e.Name()] = e.Name() + " " + target
		}
	}
	return slices.Sorted(maps.Values(fds))
}

// mountCount counts the mounts below home: other tests mount elsewhere meanwhile.
func mountCount(t *testing.T, home string) int {
	t.Helper()
	n := 0
	must(t, sys.MountPoints(func(m sys.MountPoint) { // other tests have mounts with long lines at times, which mountinfo refuses
		if strings.HasPrefix(m.Path, home+"/") {
			n++
		}
	}))
	return n
}
