package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// descriptorsEnv is the directory that TestNoDescriptorsWorker works in.
const descriptorsEnv = "OVERLAY2_TEST_DESCRIPTORS"

// TestNoSpace: whatever a call of a Driver needs of a full disk, it says so; nothing stays open or mounted, the layer can
// be removed at once, the others can be read all the while and are untouched, and when there is space again the same Driver works on.
// OVERLAY2_TEST_FAULTS_ALL=1 tries more ways to be nearly full.
func TestNoSpace(t *testing.T) {
	lefts := []int{0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023}
	if testing.Short() {
		lefts = []int{0, 15, 127, 1023}
	}
	for _, fs := range []overlaytest.FS{
		{Name: "ext4", Size: 64 << 20, Mkfs: []string{"-m", "0"}}, // without blocks that only root may take
		{Name: "xfs", Size: 300 << 20},
		{Name: "btrfs", Size: 256 << 20},
		{Name: "tmpfs", Size: 16 << 20},
	} {
		t.Run(fs.Name, func(t *testing.T) {
			overlaytest.Require(t, "root", "overlay")
			dir := overlaytest.MountFS(t, fs)
			scarcity{
				errno: unix.ENOSPC, disk: true, lefts: lefts,
				take: func(t *testing.T, left int) func() { return fillDisk(t, dir, left) },
			}.test(t, dir)
		})
	}
}

// TestNewNoSpace: New on a full disk says that, and not that the filesystem is of the wrong kind, for which a daemon
// would take another driver; and a deletion that was interrupted goes on first.
func TestNewNoSpace(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "ext4", Size: 64 << 20, Mkfs: []string{"-m", "0"}})
	overlaytest.NoLeaks(t)
	s := setupSteps(t, filepath.Join(dir, "home"))
	d := mustNew(t, s.home)
	apply(t, d, "new", "", makeTar(t, file("big", strings.Repeat("x", 1<<20))))
	must(t, d.Cleanup())
	giveBack := fillDisk(t, dir, 0)
	_, err := New(s.home, quietOptions(DurabilityBackground))
	s.checkError(t, err, unix.ENOSPC, "new on a full disk")
	must(t, os.Rename(filepath.Join(s.home, "new"), filepath.Join(s.home, stagingDir, trashPrefix+"X")))
	d = mustNew(t, s.home)
	s.verifyOthers(t, d)
	if names := stagingNames(t, d); names != "[]" {
		t.Errorf("left in staging: %s", names)
	}
	must(t, d.Cleanup())
	giveBack()
	checkEmpty(t, d)
	wantLinks(t, d, 4)
}

// TestFewDescriptors: a process that may open little gets deep chains all the same, and keeps most of it.
func TestFewDescriptors(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	if os.Getenv(descriptorsEnv) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestFewDescriptors$", "-test.v")
		cmd.Env = append(os.Environ(), descriptorsEnv+"="+t.TempDir())
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	const may, depth = 100, 120
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: may, Max: may}))
	before := len(openFDs(t))
	d := mustNew(t, os.Getenv(descriptorsEnv))
	top := deepChain(t, d, depth)
	for i := range depth {
		must(t, d.CreateReadWrite(fmt.Sprint("box", i), fmt.Sprint("layer", i), nil))
	}
	for range 3 {
		time.Sleep(2 * settleTime) // so that directories may be held
		for _, id := range []string{"box9", "box20", "box23", "box99", top} {
			path, err := d.Get(id, "")
			must(t, err)
			if id == top {
				wantChain(t, path, depth)
			}
			must(t, d.Put(id))
		}
		if now := len(openFDs(t)); now-before > may/heldDirsPart+5 { // the runtime has some
			t.Errorf("%d descriptors are held", now-before)
		}
	}
	if d.known.held == 0 {
		t.Error("nothing is held")
	}
	must(t, d.Cleanup())
}

// TestNoInodes is TestNoSpace where inodes run out.
func TestNoInodes(t *testing.T) {
	for _, fs := range []overlaytest.FS{
		{Name: "ext4", Size: 64 << 20, Mkfs: []string{"-N", "512"}},
		{Name: "tmpfs", Size: 64 << 20, Options: "nr_inodes=512"},
	} {
		t.Run(fs.Name, func(t *testing.T) {
			overlaytest.Require(t, "root", "overlay")
			dir := overlaytest.MountFS(t, fs)
			scarcity{
				errno: unix.ENOSPC, disk: true, lefts: []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32},
				take: func(t *testing.T, left int) func() { return fillInodes(t, dir, left) },
			}.test(t, dir)
		})
	}
}

// TestNoDescriptors is TestNoSpace where the process has no descriptors left, in one of its own.
func TestNoDescriptors(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	exe, err := os.Executable()
	must(t, err)
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "ext4"})
	cmd := exec.Command(exe, "-test.run=^TestNoDescriptorsWorker$", "-test.v")
	cmd.Env = append(os.Environ(), descriptorsEnv+"="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	logCounts(t, out)
}

// TestNoDescriptorsWorker is the process that TestNoDescriptors starts.
func TestNoDescriptorsWorker(t *testing.T) {
	dir := os.Getenv(descriptorsEnv)
	if dir == "" {
		return // run as a test of its own, it has nothing to do
	}
	lefts := make([]int, 40)
	for i := range lefts {
		lefts[i] = i
	}
	scarcity{errno: unix.EMFILE, lefts: lefts, take: takeDescriptors}.test(t, dir)
}

// scarcity is something that a machine runs out of.
type scarcity struct {
	errno unix.Errno
	// disk says that it is of the disk: then layers can be read and removed nevertheless.
	disk bool
	// take leaves so many units of it until the function that it returns is called.
	take func(t *testing.T, left int) (giveBack func())
	// lefts are the numbers of units to try, until the call has enough.
	lefts []int
}

// test takes all steps with ever more of what there is little of.
func (r scarcity) test(t *testing.T, dir string) {
	all := os.Getenv(faultsAllEnv) != ""
	s := setupSteps(t, filepath.Join(dir, "home"))
	for n, step := range steps(t) {
		if strings.HasPrefix(step.name, "recover") {
			continue // part of New, which the steps new-... take
		}
		ok := t.Run(step.name, func(t *testing.T) {
			rounds, failed := 0, 0
			for i, left := range r.lefts {
				if !all && i > 0 && (i+n)%4 != 0 {
					continue // the same ones each time
				}
				enough := true
				for _, remove := range []bool{false, true} {
					if !all && remove != ((i+n)%2 == 0) {
						continue
					}
					rounds++
					if err := r.round(t, s, step, left, remove); err != nil {
						failed++
						enough = false
					}
					if t.Failed() {
						t.Fatalf("with %d left, then removed: %v", left, remove)
					}
				}
				if enough {
					break
				}
				if i == len(r.lefts)-1 {
					t.Errorf("with %d left it is still too little", left)
				}
			}
			t.Logf("%d faults in %s, %d of them returned", rounds, step.name, failed)
		})
		if !ok {
			return // what it has left is in the way of the others
		}
	}
}

// round takes a step with little left, and returns its error. The layer is removed while there is still little, or kept.
func (r scarcity) round(t *testing.T, s *stepTest, step step, left int, remove bool) error {
	t.Helper()
	if step.prepare != nil {
		d := mustNew(t, s.home)
		step.prepare(t, d)
		must(t, d.Cleanup())
	}
	fds, mounts := openFDs(t), mountCount(t, s.home)
	var d *Driver
	var err error
	if !step.opens {
		d, err = New(s.home, quietOptions(step.mode))
		must(t, err)
	}
	if step.begin != nil {
		step.begin(t, d)
	}
	giveBack := r.take(t, left)
	defer func() { giveBack() }()
	if step.opens {
		d, err = New(s.home, quietOptions(step.mode))
	} else {
		err = step.run(d)
	}
	what := fmt.Sprintf("%s with %d left: %v", step.name, left, err)
	if err == nil && strings.HasPrefix(step.name, "get") {
		must(t, d.Put("new"))
	}
	remove = remove && r.disk && d != nil
	if r.disk && d != nil {
		s.readOthers(t, d)
	}
	if remove {
		must(t, d.Remove(aboveID))
		must(t, d.Remove("new"))
		d.trash.wait()
	}
	giveBack()
	giveBack = func() {}
	if err != nil {
		s.checkError(t, err, r.errno, what)
	}
	if d == nil {
		d = mustNew(t, s.home)
	}
	must(t, d.Cleanup())
	r.verify(t, s, step, d, err, remove)
	must(t, d.Cleanup())
	must(t, mustNew(t, s.home).Cleanup()) // takes up what could not be deleted
	if names := stagingNames(t, d); names != "[]" {
		t.Errorf("left in staging: %s", names)
	}
	wantNoMore(t, s.home, fds, mounts)
	if t.Failed() {
		t.Fatal(what)
	}
	return err
}

// mustNew opens a home with a quiet Driver.
func mustNew(t *testing.T, home string) *Driver {
	t.Helper()
	d, err := New(home, quietOptions(DurabilityBackground))
	must(t, err)
	return d
}

// verify looks at the home with a Driver for which something was scarce when it took a step that returned err.
func (r scarcity) verify(t *testing.T, s *stepTest, step step, d *Driver, err error, removed bool) {
	t.Helper()
	allowed := []string{step.after}
	if err != nil {
		allowed = append(append(allowed, step.before), step.between...)
	}
	if removed {
		allowed = []string{stateAbsent}
	}
	state := s.verifyAfter(t, d, step, allowed...)
	s.verifyOthers(t, d)
	if t.Failed() {
		return
	}
	if state == stateAbsent { // the same once more, with enough
		apply(t, d, "new", "top", oneTar(t))
		if got := s.state(t, d, "new"); got != treeOne {
			t.Errorf("made again the layer is %s", got)
		}
	}
	s.finish(t, d, step, state)
}

// readOthers reports layers that cannot be read as they were, by what needs no space.
func (s *stepTest) readOthers(t *testing.T, d *Driver) {
	t.Helper()
	if _, err := d.Check(); err != nil {
		t.Error(err)
	}
	for _, id := range []string{"base", "top", "sibling", "box"} {
		m, err := d.Mount(id, MountOpts{})
		must(t, err)
		if got := overlaytest.Tree(t, m.Path(), overlaytest.NoOverlayXattrs); got != s.trees[id] {
			t.Errorf("layer %s is now\n%s", id, got)
		}
		must(t, m.Close())
	}
}

// fillDisk leaves so many blocks of the filesystem of dir.
func fillDisk(t *testing.T, dir string, left int) (giveBack func()) {
	t.Helper()
	const block = 4096
	f, err := os.Create(filepath.Join(dir, "ballast"))
	must(t, err)
	fd, size := int(f.Fd()), int64(0)
	grow := func() {
		for chunk := int64(64 << 20); chunk >= block; {
			switch err := unix.Fallocate(fd, 0, size, chunk); err {
			case nil:
				size += chunk
			case unix.ENOSPC:
				chunk /= 2
			case unix.EINTR: // tmpfs gives up at a signal, of the Go runtime too
			default:
				t.Fatal(err)
			}
		}
	}
	grow()
	if left > 0 { // what lies beyond its size is given back
		must(t, unix.Ftruncate(fd, size))
		grow()
		must(t, unix.Ftruncate(fd, max(0, size-int64(left)*block)))
	}
	return func() {
		t.Helper()
		must(t, errors.Join(os.Remove(f.Name()), f.Close()))
		must(t, syncDir(dir)) // some filesystems give it back then
	}
}

// syncDir syncs the filesystem of a directory.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// fillInodes leaves so many inodes of the filesystem of dir.
func fillInodes(t *testing.T, dir string, left int) (giveBack func()) {
	t.Helper()
	ballast := filepath.Join(dir, "ballast")
	must(t, os.Mkdir(ballast, 0o700))
	n := 0
	var err error
	for ; err == nil; n++ {
		err = os.WriteFile(filepath.Join(ballast, strconv.Itoa(n)), nil, 0o600)
	}
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	if !errors.Is(err, unix.ENOSPC) || st.Ffree > 0 || st.Bavail == 0 {
		t.Fatalf("%v, %d inodes and %d blocks are left", err, st.Ffree, st.Bavail)
	}
	for n--; left > 0; left-- {
		n--
		must(t, os.Remove(filepath.Join(ballast, strconv.Itoa(n))))
	}
	return func() {
		t.Helper()
		must(t, os.RemoveAll(ballast))
	}
}

// takeDescriptors leaves so many descriptors to the process.
func takeDescriptors(t *testing.T, left int) (giveBack func()) {
	t.Helper()
	var was unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err)
	few := was
	few.Cur = 256
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &few))
	taken := []int{null}
	for {
		fd, err := unix.FcntlInt(uintptr(null), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			if err != unix.EMFILE {
				t.Fatal(err)
			}
			break
		}
		taken = append(taken, fd)
	}
	for range left {
		must(t, unix.Close(taken[len(taken)-1]))
		taken = taken[:len(taken)-1]
	}
	return func() {
		t.Helper()
		for _, fd := range taken {
			must(t, unix.Close(fd))
		}
		must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was))
	}
}

// logCounts logs the lines of a worker's output that count faults.
func logCounts(t *testing.T, out []byte) {
	t.Helper()
	for line := range bytes.Lines(out) {
		if s := string(line); strings.Contains(s, " faults") {
			t.Log(strings.TrimSpace(s))
		}
	}
}
