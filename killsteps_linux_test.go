package overlay2

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// stepEnv tells TestKillStepsWorker which step to take in which home, and at which call to die: "STEP CALL HOME".
const stepEnv = "OVERLAY2_TEST_STEP"

// TestKillStepsWorker takes one step and is killed before its CALL-th system call that changes something. If there
// are not so many it says how many there are.
func TestKillStepsWorker(t *testing.T) {
	words := strings.SplitN(os.Getenv(stepEnv), " ", 3)
	if len(words) != 3 {
		return // run as a test of its own, it has nothing to do
	}
	last, err := strconv.Atoi(words[1])
	must(t, err)
	var d *Driver
	for _, s := range steps(t) {
		if s.name != words[0] {
			continue
		}
		if !s.opens {
			d, err = New(words[2], quietOptions(s.mode))
			must(t, err)
		}
		if s.begin != nil {
			s.begin(t, d)
		}
		var calls atomic.Int64
		var armed atomic.Bool
		overlaytest.Intercept(t, overlaytest.Changing(), func(string) unix.Errno {
			if armed.Load() && calls.Add(1) == int64(last) {
				_ = unix.Kill(os.Getpid(), unix.SIGKILL)
				select {} // the call must not happen
			}
			return 0
		})
		armed.Store(true)
		if s.opens {
			if d, err = New(words[2], quietOptions(s.mode)); err == nil {
				d.trash.wait()
				err = d.flush(false)
			}
		} else {
			err = s.run(d)
		}
		armed.Store(false)
		must(t, err)
		fmt.Fprintf(os.Stdout, "\ncalls %d\n", calls.Load())
	}
}

// TestKillSteps: a process is killed before each system call that changes something, of each call of a
// Driver, of recovery too. Then the layer is as before or after the call or ErrIncomplete, and the home is in
// order. OVERLAY2_TEST_CUTS=0 tries all calls, which is some hundred; otherwise some.
func TestKillSteps(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "seccomp")
	overlaytest.NoLeaks(t)
	exe, err := os.Executable()
	must(t, err)
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "ext4"})
	usual := cuts(t, 4)
	kills, round := 0, 0
	for _, step := range steps(t) {
		t.Run(step.name, func(t *testing.T) {
			stride := 1
			for call := 1; ; call += stride {
				round++
				home := fmt.Sprintf("%s/%d", dir, round)
				n := killAtCall(t, exe, home, step, call)
				if t.Failed() {
					t.Fatalf("killed at call %d", call)
				}
				if n >= 0 {
					return
				}
				kills++
				if call == 1 && usual > 0 {
					total := killAtCall(t, exe, home+"-all", step, 1<<30)
					stride = max(1, total/usual)
				}
			}
		})
	}
	t.Logf("%d kills", kills)
}

// killAtCall takes a step in a new home and returns -1 if it was killed, otherwise how many calls there were.
func killAtCall(t *testing.T, exe, home string, step step, call int) int {
	t.Helper()
	s := setupSteps(t, home)
	if step.prepare != nil {
		d, err := New(home, quietOptions(DurabilityBackground))
		must(t, err)
		step.prepare(t, d)
		must(t, d.Cleanup())
	}
	cmd := exec.Command(exe, "-test.run=^TestKillStepsWorker$", "-test.v")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %s", stepEnv, step.name, call, home))
	out, err := cmd.CombinedOutput()
	total := -1
	if status := cmd.ProcessState.Sys().(interface{ Signaled() bool }); !status.Signaled() {
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if _, rest, ok := strings.Cut(string(out), "\ncalls "); ok {
			if _, err := fmt.Sscan(rest, &total); err != nil {
				t.Fatal(err)
			}
		}
		if total < 0 {
			t.Fatalf("neither killed nor done: %s", out)
		}
	}
	d, err := New(home, quietOptions(DurabilityBackground))
	must(t, err)
	d.trash.wait()
	allowed := []string{step.after}
	if total < 0 {
		allowed = append(append(allowed, step.before), step.between...)
	}
	state := s.verifyAfter(t, d, step, allowed...)
	s.verifyOthers(t, d)
	if !t.Failed() {
		s.finish(t, d, step, state)
	}
	must(t, d.Cleanup())
	if names := stagingNames(t, d); names != "[]" {
		t.Errorf("left in staging: %s", names)
	}
	return total
}
