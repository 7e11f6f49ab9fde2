package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// TestRepair: what one file alone does not show: modes, owners, orphans, what crashes leave.
func TestRepair(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	for name, c := range map[string]struct {
		damage func(t *testing.T, home string)
		opts   RepairOpts
		want   string // paths of actions, in order; LINK-x is the link of x
		left   string // paths of problems afterwards
	}{
		"nothing":       {damage: func(*testing.T, string) {}},
		"home writable": {damage: chmodTo(".", 0o777), want: "."},
		"l readable":    {damage: chmodTo("l", 0o755), want: "l"},
		"layer open":    {damage: chmodTo("mid", 0o755), want: "mid"},
		"layer shut":    {damage: chmodTo("mid", 0o010), want: "mid"},
		"Docker's older modes": {damage: func(t *testing.T, home string) {
			for path, mode := range map[string]os.FileMode{".": 0o701, "mid": 0o700, "top": 0o711, "base": 0o701} {
				must(t, os.Chmod(home+"/"+path, mode))
			}
		}},
		"file writable":               {damage: chmodTo("mid/lower", 0o666), want: "mid/lower"},
		"work readable":               {damage: chmodTo("box/work", 0o755), want: "box/work"},
		"owner":                       {damage: func(t *testing.T, home string) { must(t, os.Lchown(home+"/mid/link", 1000, 1000)) }, want: "mid/link"},
		"work is the remapped root's": {damage: func(t *testing.T, home string) { must(t, os.Lchown(home+"/mid/work", 1000, 1000)) }},
		"layers of Docker before 20.10.3, remapped": {damage: func(t *testing.T, home string) { // which a later one goes on with
			must(t, os.Chmod(home, 0o711))
			for _, id := range damagedLayers {
				for _, name := range []string{"", diffName, workName} {
					must(t, ignoreAbsent(os.Chown(filepath.Join(home, id, name), 100000, 100000)))
				}
				must(t, os.Chmod(home+"/"+id, 0o700))
			}
			must(t, os.Chown(home+"/mid/diff", 100007, 100007)) // as a diff may say; work tells
		}},
		"a layer of somebody else's": {damage: func(t *testing.T, home string) { must(t, os.Chown(home+"/mid", 1000, 1000)) }, want: "mid"},
		"left by a crash": {damage: func(t *testing.T, home string) {
			must(t, os.Mkdir(home+"/staging/new-X", 0o700))
			write(t, home+"/staging/new-X/link", linkA)
			must(t, os.Symlink("../none/diff", home+"/l/"+linkA))
		}, want: "staging/new-X l/" + linkA},
		"link of no layer": {damage: func(t *testing.T, home string) { must(t, os.Symlink("../none/diff", home+"/l/"+linkA)) }, want: "l/" + linkA},
		"second link":      {damage: func(t *testing.T, home string) { must(t, os.Symlink("../mid/diff", home+"/l/"+linkA)) }, want: "l/" + linkA},
		"second link in use": {damage: func(t *testing.T, home string) {
			must(t, os.Symlink("../mid/diff", home+"/l/"+linkA))
			replaceText(t, home+"/top/lower", filepath.Base(linkPath(t, home, "mid")), linkA)
		}, want: "top/lower l/" + linkA},
		"all links": {damage: func(t *testing.T, home string) {
			must(t, os.RemoveAll(home+"/l"))
			must(t, os.Mkdir(home+"/l", 0o700))
		}, want: "l/LINK-base l/LINK-base2 l/LINK-box l/LINK-lone l/LINK-mid l/LINK-side l/LINK-top"},
		"all link files": {damage: func(t *testing.T, home string) {
			for _, id := range damagedLayers {
				must(t, os.Truncate(home+"/"+id+"/link", 0))
			}
		}, want: "base/link base2/link box/link lone/link mid/link side/link top/link"},
		"all but one lower": {damage: func(t *testing.T, home string) {
			for _, id := range []string{"mid", "top"} {
				must(t, os.Truncate(home+"/"+id+"/lower", 0))
			}
		}, want: "mid/lower top/lower"},
		"parent gone":                 {damage: func(t *testing.T, home string) { must(t, os.RemoveAll(home+"/base2")) }, left: "l/LINK-base2 lone/lower"},
		"half a layer":                {damage: halfLayer, left: "orphan/diff orphan/link"},
		"half a layer, to be removed": {damage: halfLayer, opts: RepairOpts{RemoveOrphans: true}, want: "orphan"},
		"half a layer with Docker's temporary file, to be removed": {damage: func(t *testing.T, home string) {
			halfLayer(t, home)
			must(t, os.Mkdir(home+"/orphan/diff", 0o755))
			write(t, home+"/orphan/.tmp-link1234", "")
		}, opts: RepairOpts{RemoveOrphans: true}, want: "orphan"},
		"half a layer with a file of somebody's": {damage: func(t *testing.T, home string) {
			halfLayer(t, home)
			write(t, home+"/orphan/notes", "wanted")
		}, opts: RepairOpts{RemoveOrphans: true}, left: "orphan/diff orphan/link"},
		"somebody's directory": {damage: func(t *testing.T, home string) {
			must(t, os.MkdirAll(home+"/backup/diff", 0o777))
			must(t, os.Chmod(home+"/backup", 0o755)) // no mode of a layer's
			write(t, home+"/backup/file", "wanted")
		}, opts: RepairOpts{RemoveOrphans: true}, left: "backup backup/link"},
		"lost+found": {damage: func(t *testing.T, home string) { // of a home that is an ext4 filesystem's root
			must(t, os.Mkdir(home+"/lost+found", 0o700))
			write(t, home+"/lost+found/#123", "wanted")
		}, opts: RepairOpts{RemoveOrphans: true}},
		"lost+found, a layer": {damage: func(t *testing.T, home string) {
			must(t, os.Rename(home+"/box", home+"/lost+found"))
			must(t, os.Symlink("../lost+found/diff", home+"/x"))
			must(t, os.Rename(home+"/x", home+"/l/"+readText(t, home+"/lost+found/link")))
			must(t, os.Remove(home+"/lost+found/link"))
		}, want: "lost+found/link top/children"},
		"stray file": {damage: func(t *testing.T, home string) { write(t, home+"/stray", "wanted") }, opts: RepairOpts{RemoveOrphans: true}, left: "stray"},
		"incomplete": {damage: func(t *testing.T, home string) { must(t, os.Symlink("content", home+"/box/incomplete")) }, left: "box/incomplete"},
		"a layer moved to another disk": {damage: func(t *testing.T, home string) { // which Docker follows
			must(t, os.Rename(home+"/box", home+"-box"))
			must(t, os.Symlink(home+"-box", home+"/box"))
		}, left: "box l/LINK-box"},
		"incomplete without a link": {damage: func(t *testing.T, home string) {
			must(t, os.Remove(linkPath(t, home, "box")))
			must(t, os.Symlink("content", home+"/box/incomplete"))
		}, want: "l/LINK-box", left: "box/incomplete"},
	} {
		t.Run(name, func(t *testing.T) {
			overlaytest.NoLeaks(t)
			home := filepath.Join(t.TempDir(), "home")
			makeDamaged(t, home)
			var pairs []string
			for _, id := range []string{"base2", "base", "mid", "top", "side", "box", "lone"} {
				pairs = append(pairs, "LINK-"+id, filepath.Base(linkPath(t, home, id)))
			}
			names := strings.NewReplacer(pairs...)
			c.damage(t, home)
			d, err := New(home, quietOptions(DurabilityOff))
			must(t, err)
			if name == "left by a crash" { // New has dealt with it
				d.trash.wait() // which removes the link, too
				c.damage(t, home)
			}
			actions, err := d.Repair(c.opts)
			must(t, err)
			var got, left []string
			for _, a := range actions {
				got = append(got, a.Path)
			}
			must(t, d.Cleanup())
			problems, err := d.Check()
			must(t, err)
			for _, p := range problems {
				left = append(left, p.Path)
			}
			if want := sortWords(names.Replace(c.want)); sortWords(strings.Join(got, " ")) != want {
				t.Errorf("did %v\nwant %s", actions, want)
			}
			if want := sortWords(names.Replace(c.left)); sortWords(strings.Join(left, " ")) != want {
				t.Errorf("left %v\nwant %s", problems, want)
			}
			if again, err := d.Repair(c.opts); err != nil || len(again) > 0 {
				t.Errorf("again: %v %v", again, err)
			}
			must(t, d.Cleanup())
		})
	}
}

func sortWords(s string) string {
	words := strings.Fields(s)
	for i := range words {
		for j := i; j > 0 && words[j] < words[j-1]; j-- {
			words[j], words[j-1] = words[j-1], words[j]
		}
	}
	return strings.Join(words, " ")
}

func chmodTo(path string, mode os.FileMode) func(t *testing.T, home string) {
	return func(t *testing.T, home string) { must(t, os.Chmod(home+"/"+path, mode)) }
}

func replaceText(t *testing.T, path, old, new string) {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	must(t, os.WriteFile(path, bytes.ReplaceAll(data, []byte(old), []byte(new)), 0o644))
}

func readText(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	return string(data)
}

// TestRepairElsewhere: RemoveOrphans where no layer is known is an error and removes nothing: in Docker's own directory, given
// in the place of the home in it, or where all links are lost.
func TestRepairElsewhere(t *testing.T) {
	for name, c := range map[string]struct {
		make func(t *testing.T, home string)
		kept []string
	}{
		"a level too high": {func(t *testing.T, home string) {
			must(t, os.MkdirAll(home+"/volumes/db/_data", 0o755))
			write(t, home+"/volumes/db/_data/file", "wanted")
			must(t, os.MkdirAll(home+"/tmp", 0o700))
		}, []string{"volumes/db/_data/file", "tmp"}},
		"all links lost": {func(t *testing.T, home string) {
			makeDamaged(t, home)
			for _, id := range damagedLayers {
				must(t, os.Remove(linkPath(t, home, id)))
				must(t, os.Remove(home+"/"+id+"/link"))
			}
		}, []string{"top/diff/all", "box/diff/own/box"}},
	} {
		t.Run(name, func(t *testing.T) {
			overlaytest.Require(t, "root", "overlay")
			home := filepath.Join(t.TempDir(), "home")
			c.make(t, home)
			d, err := New(home, quietOptions(DurabilityOff))
			must(t, err)
			for _, dry := range []bool{true, false} {
				actions, err := d.Repair(RepairOpts{RemoveOrphans: true, DryRun: dry})
				if err == nil || len(actions) > 0 {
					t.Errorf("dry %v: %v %v", dry, actions, err)
				}
			}
			must(t, d.Cleanup())
			for _, path := range c.kept {
				if _, err := os.Stat(filepath.Join(home, path)); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// halfLayer is what Docker leaves when it is killed early in Create.
func halfLayer(t *testing.T, home string) { must(t, os.Mkdir(home+"/orphan", 0o710)) }

// TestCheckBusy: while layers are made, filled, mounted and removed, by this and another Driver, Check finds nothing,
// and Repair has nothing to do but finish what it is asked.
func TestCheckBusy(t *testing.T) {
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	d := newTestDriver(t, dir+"/home", Options{})
	other := openTestDriver(t, d.home, Options{})
	apply(t, d, "base", "", makeTar(t, file("base", "base")))
	data := makeTar(t, file("big", strings.Repeat("x", 200_000)), file("small", "s"))
	var stop atomic.Bool
	var wg sync.WaitGroup
	for i, d := range []*Driver{d, other, d, other} {
		wg.Go(func() {
			for n := 0; !stop.Load(); n++ {
				layer, box := fmt.Sprintf("layer%d-%d", i, n), fmt.Sprintf("box%d-%d", i, n)
				err := d.Create(layer, "base", nil)
				if err == nil {
					err = errOf(d.ApplyDiff(layer, "base", bytes.NewReader(data)))
				}
				if err == nil {
					err = d.CreateReadWrite(box, layer, nil)
				}
				if err == nil {
					err = errOf2(d.Get(box, ""))
				}
				if err == nil {
					err = errors.Join(d.Put(box), d.Remove(box), d.Remove(layer))
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	checks := 0
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end) && !t.Failed(); checks++ {
		checkEmpty(t, d)
		if checks%10 == 0 {
			actions, err := other.Repair(RepairOpts{RemoveOrphans: true})
			if err != nil && !errors.Is(err, ErrLayerInUse) || len(actions) > 0 {
				t.Errorf("repair: %v %v", actions, err)
			}
		}
	}
	stop.Store(true)
	wg.Wait()
	t.Logf("%d checks", checks)
}

// repairEnv tells TestRepairWorker which home to mend, and at which call to die: "CALL HOME".
const repairEnv = "OVERLAY2_TEST_REPAIR"

// TestRepairWorker mends a home and is killed before its CALL-th system call that changes something.
func TestRepairWorker(t *testing.T) {
	words := strings.SplitN(os.Getenv(repairEnv), " ", 2)
	if len(words) != 2 {
		return // run as a test of its own, it has nothing to do
	}
	var last int64
	_, err := fmt.Sscan(words[0], &last)
	must(t, err)
	d, err := New(words[1], quietOptions(DurabilityOff))
	must(t, err)
	var calls atomic.Int64
	overlaytest.Intercept(t, overlaytest.Changing(), func(string) unix.Errno {
		if calls.Add(1) == last {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {} // the call must not happen
		}
		return 0
	})
	_, err = d.Repair(RepairOpts{RemoveOrphans: true})
	must(t, err)
}

// TestRepairKilled: a Repair that is killed before any of its system calls has damaged nothing, and the next one ends it.
func TestRepairKilled(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "seccomp")
	overlaytest.NoLeaks(t)
	exe, err := os.Executable()
	must(t, err)
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	home := dir + "/home"
	makeDamaged(t, home)
	trees := map[string]string{}
	d, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	for _, id := range damagedLayers {
		trees[id], err = damagedTree(t, d, id)
		must(t, err)
	}
	must(t, d.Cleanup())
	// One damage of each kind.
	must(t, os.Remove(home+"/top/link"))
	must(t, os.Remove(linkPath(t, home, "side")))
	must(t, os.Mkdir(linkPath(t, home, "side"), 0o700))
	must(t, os.Truncate(home+"/mid/lower", 0))
	must(t, os.Remove(home+"/base2/committed"))
	must(t, os.Remove(home+"/box/work/work"))
	must(t, os.Remove(home+"/box/work"))
	must(t, os.Mkdir(home+"/lone/merged", 0o700))
	must(t, os.Chmod(home+"/base", 0o777))
	must(t, os.Symlink("../none/diff", home+"/l/"+linkA))
	halfLayer(t, home)
	for call := 1; ; call++ {
		copied := fmt.Sprintf("%s/%d", dir, call)
		overlaytest.CopyTree(t, home, copied)
		cmd := exec.Command(exe, "-test.run=^TestRepairWorker$")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s", repairEnv, call, copied))
		out, err := cmd.CombinedOutput()
		killed := cmd.ProcessState.Sys().(interface{ Signaled() bool }).Signaled()
		if !killed && err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		d, err := New(copied, quietOptions(DurabilityOff))
		must(t, err)
		if killed {
			_, err = d.Repair(RepairOpts{RemoveOrphans: true})
			must(t, err)
		}
		must(t, d.Cleanup())
		checkEmpty(t, d)
		for _, id := range damagedLayers {
			got, err := damagedTree(t, d, id)
			must(t, err)
			overlaytest.Compare(t, trees[id], got)
		}
		must(t, d.Cleanup()) // which lets go of the layers' directories
		must(t, os.RemoveAll(copied))
		if !killed || t.Failed() {
			t.Logf("%d kills", call-1)
			if call < 15 {
				t.Error("there was little to kill")
			}
			return
		}
	}
}
