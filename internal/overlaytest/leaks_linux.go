package overlaytest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long what a test used may take to disappear: goroutines that were told to
// end, threads that exit, loop devices that detach themselves.
const settle = 3 * time.Second

// NoLeaks records what the process holds and fails the test at its end if there is more
// of it then: mounts below this test's temporary directories, descriptors, loop devices, goroutines, threads
// whose working directory, root, umask or namespaces are not the process's, and changes of the
// process's own. Call it first in a test that is not parallel, as its check comes
// after the cleanups registered later.
func NoLeaks(t testing.TB) {
	t.Helper()
	noLeaks(t, settle)
}

func noLeaks(t testing.TB, settle time.Duration) {
	t.Helper()
	before := takeSnapshot(t)
	t.Cleanup(func() {
		var left []string
		// A descriptor that only a finalizer would close is a leak too: no runtime.GC here.
		for deadline := time.Now().Add(settle); ; time.Sleep(10 * time.Millisecond) {
			left = before.leftovers(takeSnapshot(t))
			if len(left) == 0 || time.Now().After(deadline) {
				break
			}
		}
		for _, s := range left {
			t.Errorf("left over: %s", s)
		}
	})
}

// snapshot is what a process holds, each thing as a text under an identity.
type snapshot struct {
	mounts     map[string]string
	fds        map[string]string
	loops      map[string]string
	goroutines map[string]string
	threads    map[string]string
	process    string
}

func takeSnapshot(t testing.TB) snapshot {
	return snapshot{
		mounts: snapMounts(t), fds: snapFDs(t), loops: snapLoops(), goroutines: snapGoroutines(),
		threads: snapThreads(), process: fsState("/proc/self"),
	}
}

// leftovers lists what is in now and not in s.
func (s snapshot) leftovers(now snapshot) []string {
	var left []string
	add := func(kind string, before, after map[string]string) {
		for _, key := range slices.Sorted(maps.Keys(after)) {
			if _, ok := before[key]; !ok {
				left = append(left, kind+" "+after[key])
			}
		}
	}
	add("mount", s.mounts, now.mounts)
	add("descriptor", s.fds, now.fds)
	add("loop device", s.loops, now.loops)
	add("goroutine", s.goroutines, now.goroutines)
	add("thread", s.threads, now.threads)
	if s.process != now.process {
		left = append(left, fmt.Sprintf("the process changed from %s to %s", s.process, now.process))
	}
	return left
}

// snapMounts returns the mounts that may be this test's: other programs mount things in
// the same namespace meanwhile, so only those below directories named as t.TempDir and
// MountFS name them count.
func snapMounts(t testing.TB) map[string]string {
	points, err := mountPoints()
	if err != nil {
		t.Fatal(err)
	}
	test, _, _ := strings.Cut(t.Name(), "/")
	mine := regexp.MustCompile("^" + regexp.QuoteMeta(os.TempDir()) + "/(" + regexp.QuoteMeta(test) + `[^/]*\d|overlaytest-` + strconv.Itoa(os.Getpid()) + "-[^/]*)/")
	mounts := make(map[string]string)
	for i, p := range points {
		if mine.MatchString(p) {
			mounts[fmt.Sprintf("%s %d", p, countBefore(points, i))] = p
		}
	}
	return mounts
}

// countBefore tells stacked mounts of one mount point apart.
func countBefore(points []string, i int) int {
	n := 0
	for _, p := range points[:i] {
		if p == points[i] {
			n++
		}
	}
	return n
}

// snapFDs returns the open descriptors but those of the Go runtime, which opens its
// poller when it is first needed and keeps it.
func snapFDs(t testing.TB) map[string]string {
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	fds := make(map[string]string)
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		// The descriptor of the directory itself is gone by now.
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") || strings.HasPrefix(target, "anon_inode:[pidfd") {
			continue
		}
		fds[e.Name()+" "+target] = e.Name() + " " + target
	}
	return fds
}

// snapLoops returns the loop devices bound to files of this process.
func snapLoops() map[string]string {
	loops := make(map[string]string)
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range files {
		backing, err := os.ReadFile(file)
		if err == nil && strings.Contains(string(backing), fmt.Sprintf("overlaytest-%d-", os.Getpid())) {
			loops[file] = fmt.Sprintf("%s of %s", filepath.Base(filepath.Dir(filepath.Dir(file))), strings.TrimSpace(string(backing)))
		}
	}
	return loops
}

// snapGoroutines returns the stacks of goroutines that are neither the test's own nor the
// runtime's, by number.
func snapGoroutines() map[string]string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	goroutines := make(map[string]string)
	for stack := range strings.SplitSeq(string(buf), "\n\n") {
		f := strings.Fields(stack)
		if len(f) < 2 || ownGoroutine(stack) {
			continue
		}
		goroutines[f[1]] = stack
	}
	return goroutines
}

// ownGoroutine tells goroutines of the testing package and of os/signal.
func ownGoroutine(stack string) bool {
	for _, frame := range []string{"testing.tRunner(", "testing.(*M).", "testing.runFuzz", "testing.(*B).", "os/signal.loop(", "testing.(*T).Run("} {
		if strings.Contains(stack, frame) {
			return true
		}
	}
	return false
}

// snapThreads returns the threads that differ from the process in what they see of the
// filesystem. Go keeps ordinary threads for later use, so their number says nothing; a
// thread with a state of its own must have been thrown away.
func snapThreads() map[string]string {
	process := fsState("/proc/self")
	pid := os.Getpid()
	threads := make(map[string]string)
	tasks, _ := filepath.Glob("/proc/self/task/*")
	for _, task := range tasks {
		tid, err := strconv.Atoi(filepath.Base(task))
		if err != nil {
			continue
		}
		state := fsState(task)
		switch {
		case state == "":
			// It ended meanwhile.
		case state != process:
			threads[task] = fmt.Sprintf("%s is at %s, the process at %s", task, state, process)
		case ownFS(pid, tid):
			threads[task] = task + " doesn't share its umask and working directory with the process"
		}
	}
	return threads
}

// ownFS reports whether a thread has left the process's fs struct by unshare(CLONE_FS).
// A kernel without kcmp(2) cannot tell.
func ownFS(pid, tid int) bool {
	const kcmpFS = 3
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid), uintptr(tid), kcmpFS, 0, 0, 0)
	return errno == 0 && r != 0
}

// fsState describes how a task sees the filesystem, "" if it is gone.
func fsState(task string) string {
	var b strings.Builder
	for _, name := range []string{"cwd", "root", "ns/mnt", "ns/user"} {
		target, err := os.Readlink(filepath.Join(task, name))
		if err != nil {
			return ""
		}
		fmt.Fprintf(&b, "%s=%s ", name, target)
	}
	status, err := os.ReadFile(filepath.Join(task, "status"))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(status)) {
		if mask, ok := strings.CutPrefix(line, "Umask:"); ok {
			b.WriteString("umask=" + strings.TrimSpace(mask))
		}
	}
	return b.String()
}
