package overlay2

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// dockerCreate makes a layer as Docker does, with the same steps.
func dockerCreate(t testing.TB, home, id, parent, version string) {
	t.Helper()
	put := func(path, text string, mode os.FileMode) {
		if version == "19.03" { // in place
			must(t, os.WriteFile(path, []byte(text), mode))
			return
		}
		tmp := filepath.Join(filepath.Dir(path), ".tmp-"+rand.Text())
		must(t, os.WriteFile(tmp, []byte(text), mode))
		must(t, os.Rename(tmp, path))
	}
	dir := filepath.Join(home, id)
	must(t, os.Mkdir(dir, 0o710))
	must(t, os.Mkdir(dir+"/diff", 0o755))
	link, err := linkid.New()
	must(t, err)
	must(t, os.Symlink("../"+id+"/diff", home+"/l/"+link))
	put(dir+"/link", link, 0o644)
	if parent == "" {
		return
	}
	must(t, os.Mkdir(dir+"/work", 0o700))
	if version != "18.09" { // moby#39780
		put(filepath.Join(home, parent, "committed"), "", 0o600)
	}
	data, err := os.ReadFile(filepath.Join(home, parent, "link"))
	must(t, err)
	lower := "l/" + string(data)
	if data, err := os.ReadFile(filepath.Join(home, parent, "lower")); err == nil {
		lower += ":" + string(data)
	}
	put(dir+"/lower", lower, 0o644)
}

// dockerRemove removes a layer as Docker does.
func dockerRemove(t testing.TB, home, id string) {
	t.Helper()
	link, err := os.ReadFile(filepath.Join(home, id, "link"))
	must(t, err)
	must(t, os.Remove(home+"/l/"+string(link)))
	must(t, os.RemoveAll(filepath.Join(home, id)))
}

// settleTick is longer than a tick of the clock of inodes: a file changed longer ago cannot be changed without a trace.
const settleTick = 25 * time.Millisecond

// wantListed fails the test if the list of a layer's children is not sealed, or has another length.
func wantListed(t *testing.T, d *Driver, id string, want int) {
	t.Helper()
	l, err := openLayer(d.home, id)
	must(t, err)
	defer l.close()
	names, err := l.readList()
	must(t, err)
	if names == nil || len(names) != want {
		t.Errorf("children of %s: %v, want %d", id, names, want)
	}
}

// TestChildrenOfDocker: a layer with a child is never removed, whoever made either, whoever removed others, and in whatever order.
func TestChildrenOfDocker(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	for _, version := range []string{"28", "19.03", "18.09"} {
		for name, c := range map[string]func(t *testing.T, d *Driver, docker func(id, parent string)){
			"its child of ours": func(t *testing.T, d *Driver, docker func(id, parent string)) {
				must(t, d.Create("parent", "", nil))
				docker("child", "parent")
			},
			"its child beside ours": func(t *testing.T, d *Driver, docker func(id, parent string)) {
				must(t, d.Create("parent", "", nil))
				must(t, d.Create("first", "parent", nil))
				docker("child", "parent")
				must(t, d.Remove("first"))
			},
			"ours beside its child": func(t *testing.T, d *Driver, docker func(id, parent string)) {
				docker("parent", "")
				docker("child", "parent")
				must(t, d.Create("second", "parent", nil))
				must(t, d.Remove("second"))
			},
			"its own": func(t *testing.T, d *Driver, docker func(id, parent string)) {
				docker("parent", "")
				docker("child", "parent")
			},
			"ours of its own": func(t *testing.T, d *Driver, docker func(id, parent string)) {
				docker("parent", "")
				must(t, d.Create("child", "parent", nil))
			},
			"its child after a look": func(t *testing.T, d *Driver, docker func(id, parent string)) {
				docker("parent", "")
				docker("first", "parent")
				time.Sleep(settleTick)
				wantErr(t, d.Remove("parent"), ErrLayerInUse) // which seals the list
				wantListed(t, d, "parent", 1)
				docker("child", "parent")
				must(t, d.Remove("first"))
			},
			"ours after a look": func(t *testing.T, d *Driver, docker func(id, parent string)) {
				docker("parent", "")
				docker("first", "parent")
				time.Sleep(settleTick)
				wantErr(t, d.Remove("parent"), ErrLayerInUse)
				must(t, d.Create("child", "parent", nil))
				dockerRemove(t, d.home, "first")
			},
			"in the place of ours": func(t *testing.T, d *Driver, docker func(id, parent string)) {
				must(t, d.Create("parent", "", nil))
				must(t, d.Create("child", "parent", nil))
				dockerRemove(t, d.home, "child")
				docker("child", "parent")
			},
		} {
			if version == "18.09" && !strings.HasPrefix(name, "its own") && !strings.HasPrefix(name, "ours") {
				continue // it says of no layer that it has got a child: a home cannot be shared with it
			}
			t.Run(name+", "+version, func(t *testing.T) {
				d := newTestDriver(t, t.TempDir(), Options{})
				c(t, d, func(id, parent string) { dockerCreate(t, d.home, id, parent, version) })
				wantErr(t, d.Remove("parent"), ErrLayerInUse)
				if version == "18.09" {
					_, err := d.Repair(RepairOpts{})
					must(t, err)
				}
				checkEmpty(t, d)
				wantErr(t, d.Remove("parent"), ErrLayerInUse)
				must(t, d.Remove("child"))
				must(t, d.Remove("parent"))
				checkEmpty(t, d)
				must(t, d.Cleanup())
				wantLinks(t, d, len(homeNames(t, d)))
			})
		}
	}
}

// TestChildList: what the list of a layer's children holds, and that it is believed only as long as it is certain.
func TestChildList(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	long := strings.Repeat("x", maxIDLen)
	home := func(t *testing.T) *Driver {
		d := newTestDriver(t, t.TempDir(), Options{})
		must(t, d.Create("parent", "", nil))
		must(t, d.Create("child", "parent", nil))
		must(t, d.CreateReadWrite(long, "parent", nil))
		must(t, d.Create("gone", "parent", nil))
		must(t, d.Remove("gone"))
		wantListed(t, d, "parent", 2)
		must(t, d.Remove(long))
		wantListed(t, d, "parent", 1)
		return d
	}
	for name, damage := range map[string]func(t *testing.T, parent string){
		"none":    func(*testing.T, string) {},
		"no seal": func(t *testing.T, parent string) { must(t, os.Remove(parent+"/listed")) },
		"no list": func(t *testing.T, parent string) { must(t, os.RemoveAll(parent+"/children")) },
		"another list": func(t *testing.T, parent string) {
			must(t, os.Rename(parent+"/children", parent+"/x"))
			must(t, os.Mkdir(parent+"/children", 0o700))
		},
		"a file as list": func(t *testing.T, parent string) {
			must(t, os.RemoveAll(parent+"/children"))
			write(t, parent+"/children", "x")
		},
		"garbage in list": func(t *testing.T, parent string) { write(t, parent+"/children/x", "x") },
		"committed lost":  func(t *testing.T, parent string) { must(t, os.Remove(parent+"/committed")) },
		"all lost": func(t *testing.T, parent string) {
			must(t, os.RemoveAll(parent+"/children"))
			must(t, os.Remove(parent+"/committed"))
		},
		"link lost":        func(t *testing.T, parent string) { must(t, os.Remove(linkPath(t, filepath.Dir(parent), "parent"))) },
		"link file lost":   func(t *testing.T, parent string) { must(t, os.Truncate(parent+"/link", 0)) },
		"the child's link": func(t *testing.T, parent string) { must(t, os.Truncate(filepath.Dir(parent)+"/child/link", 0)) },
		"committed replaced": func(t *testing.T, parent string) {
			must(t, os.Remove(parent+"/committed"))
			write(t, parent+"/committed", "")
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := home(t)
			damage(t, filepath.Join(d.home, "parent"))
			wantErr(t, d.Remove("parent"), ErrLayerInUse)
			must(t, d.Remove("child"))
			must(t, d.Remove("parent"))
			must(t, d.Cleanup())
		})
	}
	t.Run("copied", func(t *testing.T) {
		d := home(t)
		must(t, d.Cleanup())
		copied := filepath.Join(t.TempDir(), "home")
		overlaytest.CopyTree(t, d.home, copied)
		must(t, os.RemoveAll(copied+"/parent/children")) // as a copy by hand might leave out
		must(t, os.Mkdir(copied+"/parent/children", 0o700))
		d2 := newTestDriver(t, copied, Options{})
		wantErr(t, d2.Remove("parent"), ErrLayerInUse)
	})
	t.Run("entry lost", func(t *testing.T) { // seen by Check, mended by Repair
		d := home(t)
		names, err := filepath.Glob(d.home + "/parent/children/*.child")
		if err != nil || len(names) != 1 {
			t.Fatalf("%q %v", names, err)
		}
		must(t, os.Remove(names[0]))
		if problems, err := d.Check(); err != nil || len(problems) != 1 || problems[0].Path != "parent/children" {
			t.Errorf("%v %v", problems, err)
		}
		if actions, err := d.Repair(RepairOpts{}); err != nil || len(actions) != 1 {
			t.Errorf("%v %v", actions, err)
		}
		checkEmpty(t, d)
		wantListed(t, d, "parent", 1)
		wantErr(t, d.Remove("parent"), ErrLayerInUse)
	})
}

// costsEnv tells TestCostsWorker that it is one.
const costsEnv = "OVERLAY2_TEST_COSTS"

// TestCosts: no call makes more system calls in a home of 1,000 layers than in one of 10, whatever it says of children.
func TestCosts(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "seccomp")
	overlaytest.NoLeaks(t)
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.Command(exe, "-test.run=^TestCostsWorker$", "-test.v")
	cmd.Env = append(os.Environ(), costsEnv+"="+overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs", Options: "nr_inodes=0"}))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for line := range strings.SplitSeq(string(out), "\n") {
		if strings.Contains(line, "calls") {
			t.Log(strings.TrimSpace(line))
		}
	}
}

// TestCostsWorker counts the system calls of each call in homes of different sizes.
func TestCostsWorker(t *testing.T) {
	dir := os.Getenv(costsEnv)
	if dir == "" {
		return // run as a test of its own, it has nothing to do
	}
	sizes := []int{10, 1000}
	homes := map[string]*Driver{}
	for _, n := range sizes {
		d, err := New(fmt.Sprintf("%s/%d", dir, n), quietOptions(DurabilityOff))
		must(t, err)
		docker, err := New(fmt.Sprintf("%s/docker%d", dir, n), quietOptions(DurabilityOff))
		must(t, err)
		must(t, d.Create("base", "", nil))
		dockerCreate(t, docker.home, "base", "", "28")
		for _, id := range []string{"a", "b"} { // committed, without a child in the end
			must(t, d.Create(id, "base", nil))
			dockerCreate(t, docker.home, id, "base", "28")
			must(t, d.Create(id+"-child", id, nil))
			dockerCreate(t, docker.home, id+"-child", id, "28")
		}
		for i := range n {
			must(t, d.Create(fmt.Sprint("layer", i), "base", nil))
			dockerCreate(t, docker.home, fmt.Sprint("layer", i), "base", "28")
		}
		for _, id := range []string{"a", "b"} {
			must(t, d.Remove(id+"-child"))
			dockerRemove(t, docker.home, id+"-child")
		}
		must(t, docker.Remove("a")) // looks at all once, and seals
		homes[fmt.Sprint(n)], homes[fmt.Sprint("docker", n)] = d, docker
	}
	var calls atomic.Int64
	overlaytest.Intercept(t, overlaytest.Failing(), func(string) unix.Errno { calls.Add(1); return 0 })
	counts := map[string]map[string]int64{}
	for _, name := range []string{"10", "1000", "docker10", "docker1000"} {
		d := homes[name]
		counts[name] = map[string]int64{}
		count := func(what string, f func() error) {
			before := calls.Load()
			must(t, f())
			d.trash.wait()
			counts[name][what] = calls.Load() - before
		}
		inUse := func() error {
			if err := d.Remove("base"); !errors.Is(err, ErrLayerInUse) {
				return fmt.Errorf("a layer with children: %w", err)
			}
			return nil
		}
		must(t, inUse())
		count("New", func() error {
			again, err := New(d.home, quietOptions(DurabilityOff))
			if err != nil {
				return err
			}
			return again.Cleanup()
		})
		count("Create", func() error { return d.CreateReadWrite("box", "base", nil) })
		count("Get", func() error { return errOf2(d.Get("box", "")) })
		count("Put", func() error { return d.Put("box") })
		count("Remove, no child", func() error { return d.Remove("box") })
		count("Remove, had a child", func() error { return d.Remove("b") })
		count("Remove, refused", inUse)
		count("Exists", func() error {
			if !d.Exists("base") {
				return ErrLayerNotFound
			}
			return nil
		})
	}
	for _, home := range []string{"", "docker"} {
		few, many := counts[home+"10"], counts[home+"1000"]
		t.Logf("%s %d layers: calls %v", home, sizes[0], few)
		t.Logf("%s %d layers: calls %v", home, sizes[1], many)
		for what, n := range many {
			// A name of more digits, a list of two blocks; and New tries again what is busy for a moment.
			if n > few[what]+1+few[what]/20 {
				t.Errorf("%s %s: %d calls, with few layers %d", what, home, n, few[what])
			}
		}
	}
}

// killChildrenEnv tells TestKillChildrenWorker what to do in which home, and at which call to die: "CASE CALL HOME".
const killChildrenEnv = "OVERLAY2_TEST_KILL_CHILDREN"

// childCases are what TestKillChildren interrupts, and what is made before.
var childCases = []struct {
	name    string
	prepare func(t *testing.T, d *Driver)
	run     func(d *Driver) error
}{
	{"first child", func(t *testing.T, d *Driver) { must(t, d.Create("parent", "", nil)) },
		func(d *Driver) error { return d.Create("child", "parent", nil) }},
	{"first child of Docker's", func(t *testing.T, d *Driver) { dockerCreate(t, d.home, "parent", "", "28") },
		func(d *Driver) error { return d.Create("child", "parent", nil) }},
	{"second child", func(t *testing.T, d *Driver) {
		must(t, d.Create("parent", "", nil))
		must(t, d.Create("other", "parent", nil))
	}, func(d *Driver) error { return d.CreateReadWrite("child", "parent", nil) }},
	{"remove the child", func(t *testing.T, d *Driver) {
		must(t, d.Create("parent", "", nil))
		must(t, d.Create("child", "parent", nil))
	}, func(d *Driver) error { return d.Remove("child") }},
	{"remove the parent", func(t *testing.T, d *Driver) {
		must(t, d.Create("parent", "", nil))
		must(t, d.Create("child", "parent", nil))
		must(t, d.Remove("child"))
	}, func(d *Driver) error { return d.Remove("parent") }},
	{"rebase", func(t *testing.T, d *Driver) {
		must(t, d.Create("parent", "", nil))
		must(t, d.Create("other", "", nil))
		must(t, d.Create("child", "other", nil))
	}, func(d *Driver) error { return d.Rebase("child", "parent") }},
	{"look at all", func(t *testing.T, d *Driver) {
		for _, id := range []string{"parent", "child", "grandchild"} {
			dockerCreate(t, d.home, id, map[string]string{"child": "parent", "grandchild": "child"}[id], "28")
		}
	}, func(d *Driver) error {
		if err := d.Remove("parent"); !errors.Is(err, ErrLayerInUse) {
			return fmt.Errorf("a layer with a child: %w", err)
		}
		return nil
	}},
}

// TestKillChildrenWorker is killed before its CALL-th system call that changes something.
func TestKillChildrenWorker(t *testing.T) {
	words := strings.SplitN(os.Getenv(killChildrenEnv), " ", 3)
	if len(words) != 3 {
		return // run as a test of its own, it has nothing to do
	}
	var n, last int64
	_, err := fmt.Sscan(words[0]+" "+words[1], &n, &last)
	must(t, err)
	d, err := New(words[2], quietOptions(DurabilityBackground))
	must(t, err)
	var calls atomic.Int64
	var armed atomic.Bool
	overlaytest.Intercept(t, overlaytest.Changing(), func(string) unix.Errno {
		if armed.Load() && calls.Add(1) == last {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {} // the call must not happen
		}
		return 0
	})
	armed.Store(true)
	err = childCases[n].run(d)
	armed.Store(false)
	must(t, err)
}

// TestKillChildren: a process is killed before each system call that changes something, while it makes or removes a child or
// seals lists. Never is a layer removed then that has a child, and always one that has none.
func TestKillChildren(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "seccomp")
	overlaytest.NoLeaks(t)
	exe, err := os.Executable()
	must(t, err)
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "ext4"})
	kills := 0
	for n, c := range childCases {
		t.Run(c.name, func(t *testing.T) {
			for call, killed := 1, true; killed && !t.Failed(); call++ {
				home := fmt.Sprintf("%s/%d-%d", dir, n, call)
				d, err := New(home, quietOptions(DurabilityBackground))
				must(t, err)
				c.prepare(t, d)
				must(t, d.Cleanup())
				cmd := exec.Command(exe, "-test.run=^TestKillChildrenWorker$", "-test.v")
				cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %s", killChildrenEnv, n, call, home))
				out, err := cmd.CombinedOutput()
				killed = cmd.ProcessState.Sys().(interface{ Signaled() bool }).Signaled()
				if err != nil && !killed {
					t.Fatalf("%v: %s", err, out)
				}
				if killed {
					kills++
				}
				removeAll(t, home)
				if t.Failed() {
					t.Errorf("killed at call %d", call)
				}
			}
		})
	}
	t.Logf("%d kills", kills)
}

// removeAll removes all layers of a home: no layer that has a child goes, all others do.
func removeAll(t *testing.T, home string) {
	t.Helper()
	d, err := New(home, quietOptions(DurabilityBackground))
	must(t, err)
	checkEmpty(t, d)
	for left := homeNames(t, d); len(left) > 0 && !t.Failed(); left = homeNames(t, d) {
		parents := map[string]bool{}
		for _, id := range left {
			l, err := openLayer(d.home, id)
			must(t, err)
			lowers, err := l.lowers()
			must(t, err)
			l.close()
			ids, err := resolve(d.home, lowers)
			must(t, err)
			for _, id := range ids {
				parents[id] = true
			}
		}
		for _, id := range left {
			if parents[id] {
				wantErr(t, d.Remove(id), ErrLayerInUse)
			}
		}
		for _, id := range slices.DeleteFunc(left, func(id string) bool { return parents[id] }) {
			must(t, d.Remove(id))
		}
	}
	must(t, d.Cleanup())
	wantEmptyHome(t, d)
}

// TestSealAtOnce: a write in place to the mark of a layer that just got its first child breaks the seal of
// its list, though it comes within the same tick of the clock. So it does on each filesystem.
func TestSealAtOnce(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	for _, fs := range []string{"ext4", "tmpfs", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			home := overlaytest.MountFS(t, overlaytest.FS{Name: fs})
			d := newTestDriver(t, home, Options{})
			sealAtOnce(t, d, home)
		})
	}
}

func sealAtOnce(t *testing.T, d *Driver, home string) {
	for i := range 20 {
		parent, child := fmt.Sprint("parent", i), fmt.Sprint("child", i)
		must(t, d.Create(parent, "", nil))
		must(t, d.Create(child, parent, nil))
		mark := filepath.Join(home, parent, committedName)
		var st unix.Stat_t
		must(t, unix.Stat(mark, &st))
		if st.Mtim.Sec != markSec || st.Size != 0 || st.Mode != unix.S_IFREG|0o600 || st.Nlink != 1 {
			t.Fatalf("%s: %+v", mark, st)
		}
		wantListed(t, d, parent, 1)
		must(t, os.WriteFile(mark, nil, 0o600))
		l, err := openLayer(home, parent)
		must(t, err)
		names, err := l.readList()
		must(t, err)
		l.close()
		if names != nil {
			t.Fatalf("the seal of %s holds", parent)
		}
	}
}

// TestParentRestored: a layer put back as it was before it had a child is not removed: its seal says that it has none, but
// it is another's, as is one that a version before wrote.
func TestParentRestored(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		for name, c := range map[string]func(t *testing.T, d *Driver){
			"nothing else": func(*testing.T, *Driver) {},
			"another child": func(t *testing.T, d *Driver) { // which makes the parent's list again
				must(t, d.Create("other", "parent", nil))
				must(t, d.Remove("other"))
			},
			"a seal of before": func(t *testing.T, d *Driver) {
				must(t, os.Remove(d.home+"/parent/listed"))
				must(t, os.Symlink(d.seal("-"), d.home+"/parent/listed"))
			},
		} {
			for _, docker := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, Docker's child %v", name, docker), func(t *testing.T) {
					home := filepath.Join(dir, rand.Text())
					d := newTestDriver(t, home, quietOptions(DurabilityOff))
					must(t, d.Create("parent", "", nil))
					overlaytest.CopyTree(t, home+"/parent", home+"-parent")
					if docker {
						dockerCreate(t, home, "child", "parent", "28")
					} else {
						must(t, d.Create("child", "parent", nil))
					}
					must(t, os.RemoveAll(home+"/parent"))
					must(t, os.Rename(home+"-parent", home+"/parent"))
					d = openTestDriver(t, home, quietOptions(DurabilityOff))
					c(t, d)
					wantErr(t, d.Remove("parent"), ErrLayerInUse)
					_, err := d.Repair(RepairOpts{})
					must(t, err)
					checkEmpty(t, d)
					wantErr(t, d.Remove("parent"), ErrLayerInUse)
					must(t, d.Remove("child"))
					must(t, d.Remove("parent"))
				})
			}
		}
	})
}
