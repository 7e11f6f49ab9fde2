package overlaytest

import (
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

const interceptEnv = "OVERLAY2_TEST_INTERCEPT"

// TestInterceptSignals: signals, as the runtime sends them to its threads, make no call wait for ever.
func TestInterceptSignals(t *testing.T) {
	Require(t, "root", "seccomp")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestInterceptSignalsWorker$", "-test.v", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), interceptEnv+"=1", "GODEBUG=containermaxprocs=0,updatemaxprocs=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
}

// TestInterceptSignalsWorker is the process that TestInterceptSignals starts.
func TestInterceptSignalsWorker(t *testing.T) {
	if os.Getenv(interceptEnv) == "" {
		return // run as a test of its own, it has nothing to do
	}
	var decided, calls, refused atomic.Int64
	var listener atomic.Int64
	Intercept(t, Failing(), func(string) unix.Errno {
		listener.Store(int64(unix.Gettid()))
		if decided.Add(1)%100 == 0 {
			return unix.ENOSPC
		}
		return 0
	})
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for range 10_000 {
				var st unix.Stat_t
				calls.Add(1)
				if err := unix.Fstat(int(dir.Fd()), &st); err == unix.ENOSPC {
					refused.Add(1)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() {
		callers.Wait()
		close(done)
	}()
	for {
		select {
		case <-done:
			if refused.Load() < calls.Load()/200 {
				t.Errorf("%d of %d calls refused", refused.Load(), calls.Load())
			}
			return
		default:
			if tid := listener.Load(); tid != 0 {
				_ = unix.Tgkill(os.Getpid(), int(tid), unix.SIGURG)
			}
		}
	}
}
