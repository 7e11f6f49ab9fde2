package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// repairBusyEnv is the home of the process that TestRepairBusy starts.
const repairBusyEnv = "OVERLAY2_TEST_REPAIR_BUSY"

// TestRepairBusyWorker makes, fills, mounts, reads and removes layers of its own over "base2" until its input ends.
func TestRepairBusyWorker(t *testing.T) {
	home := os.Getenv(repairBusyEnv)
	if home == "" {
		return // run as a test of its own, it has nothing to do
	}
	d, err := New(home, quietOptions(DurabilityBackground))
	must(t, err)
	ended := make(chan struct{})
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1))
		close(ended)
	}()
	fmt.Fprintln(os.Stdout, "ready")
	data := makeTar(t, file("busy", strings.Repeat("b", 50_000)))
	for n := 0; ; n++ {
		select {
		case <-ended:
			must(t, d.Cleanup())
			return
		default:
		}
		layer, box := fmt.Sprint("busy", n), fmt.Sprint("busybox", n)
		must(t, d.Create(layer, "base2", nil))
		must(t, errOf(d.ApplyDiff(layer, "base2", bytes.NewReader(data))))
		must(t, d.CreateReadWrite(box, layer, nil))
		path, err := d.Get(box, "")
		must(t, err)
		if got, err := os.ReadFile(path + "/own/base2"); err != nil || string(got) != "base2" {
			t.Fatalf("%q %v", got, err)
		}
		must(t, readAll(d, layer, "base2"))
		must(t, errors.Join(d.Put(box), d.Remove(box), d.Remove(layer)))
	}
}

// TestRepairBusy: one damage after the other is reported and mended while another process uses the home, which notices nothing.
func TestRepairBusy(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	exe, err := os.Executable()
	must(t, err)
	home := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"}) + "/home"
	makeDamaged(t, home)
	cmd := exec.Command(exe, "-test.run=^TestRepairBusyWorker$", "-test.timeout=10m")
	cmd.Env = append(os.Environ(), repairBusyEnv+"="+home)
	in, err := cmd.StdinPipe()
	must(t, err)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	d, err := New(home, quietOptions(DurabilityBackground))
	must(t, err)
	trees := map[string]string{}
	for _, id := range damagedLayers {
		trees[id], err = damagedTree(t, d, id)
		must(t, err)
	}
	for name, damage := range map[string]func() error{
		"link":      func() error { return os.Remove(home + "/top/link") },
		"l":         func() error { return os.Remove(linkPath(t, home, "mid")) },
		"lower":     func() error { return os.Truncate(home+"/mid/lower", 0) },
		"committed": func() error { return os.Remove(home + "/base/committed") },
		"work":      func() error { return os.RemoveAll(home + "/box/work") },
		"merged":    func() error { return os.Mkdir(home+"/side/merged", 0o700) },
		"mode":      func() error { return os.Chmod(home+"/mid", 0o777) },
		"l entry":   func() error { return os.Symlink("../none/diff", home+"/l/"+linkA) },
	} {
		must(t, damage())
		problems, err := d.Check()
		must(t, err)
		if len(problems) == 0 {
			t.Errorf("%s: not reported", name)
		}
		for _, p := range problems {
			if strings.HasPrefix(p.ID, "busy") {
				t.Errorf("%s: a false alarm: %v", name, p)
			}
		}
		actions, err := d.Repair(RepairOpts{RemoveOrphans: true})
		for _, a := range actions {
			if strings.HasPrefix(a.ID, "busy") {
				t.Errorf("%s: mended what was whole: %v", name, a)
			}
		}
		if err != nil || len(actions) == 0 {
			t.Errorf("%s: %v %v", name, actions, err)
		}
		checkEmpty(t, d)
		for _, id := range damagedLayers {
			got, err := damagedTree(t, d, id)
			must(t, err)
			overlaytest.Compare(t, trees[id], got)
		}
	}
	must(t, in.Close())
	if err := cmd.Wait(); err != nil {
		t.Errorf("the other process: %v: %s", err, out.String())
	}
	must(t, d.Cleanup())
	checkEmpty(t, d)
}

// TestPlanRepairReadOnly: a home on a filesystem that nobody can write is checked, and what would mend it is listed.
func TestPlanRepairReadOnly(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	home := dir + "/home"
	makeDamaged(t, home)
	must(t, os.RemoveAll(home+"/staging")) // as dockerd's
	must(t, os.Remove(home+"/top/link"))
	must(t, os.Mkdir(dir+"/ro", 0o700))
	must(t, sys.BindReadOnly(home, dir+"/ro"))
	t.Cleanup(func() { must(t, unix.Unmount(dir+"/ro", 0)) })
	problems, err := CheckHome(dir + "/ro")
	if err != nil || len(problems) == 0 {
		t.Errorf("check: %v %v", problems, err)
	}
	actions, err := PlanRepair(dir+"/ro", RepairOpts{})
	if err != nil || len(actions) != 1 || actions[0].Path != "top/link" {
		t.Errorf("plan: %v %v", actions, err)
	}
	if _, err := PlanRepair(dir+"/none", RepairOpts{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
}
