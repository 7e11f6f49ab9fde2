//go:build linux

package overlay2

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// longMount mounts an overlay of many layers, which makes a line in mountinfo that is longer than a bufio.Scanner takes. It
// returns false on a kernel that has no such mounts.
func longMount(t *testing.T, dir string) bool {
	t.Helper()
	if d := openTestDriver(t, t.TempDir(), Options{}); d.facts.newAPI != yes {
		t.Log("the kernel mounts no chain with names of such length: " + d.facts.newAPIErr.Error())
		return false
	}
	c, err := sys.OpenFS("overlay")
	if err != nil {
		t.Fatal(err)
	}
	c.Set("source", "overlay")
	for i := range 400 {
		lower := fmt.Sprintf("%s/%0*d", dir, 240-len(dir), i)
		if err := os.Mkdir(lower, 0o700); err != nil {
			t.Fatal(err)
		}
		c.Set("lowerdir+", lower)
	}
	fd, err := c.Mount(0)
	if err != nil {
		t.Fatal(err)
	}
	merged := filepath.Join(dir, "merged")
	if err := os.Mkdir(merged, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := sys.MoveMount(fd, merged); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(merged, 0)) })
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	longest := 0
	for line := range strings.SplitSeq(string(data), "\n") {
		longest = max(longest, len(line))
	}
	if longest <= 64<<10 {
		t.Fatalf("the longest line has %d bytes", longest)
	}
	return true
}

// TestNewBesideLongMount: somebody's overlay of many layers does not disturb New.
func TestNewBesideLongMount(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	if !longMount(t, dir) {
		return
	}
	d, err := New(filepath.Join(dir, "home"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Cleanup(); err != nil {
		t.Error(err)
	}
}

// TestTrashBesideLongMount: nor the deletion of a layer in which something is mounted.
func TestTrashBesideLongMount(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{Durability: DurabilityOff})
	if !longMount(t, t.TempDir()) {
		return
	}
	must(t, d.CreateReadWrite("box", "", nil))
	must(t, os.Mkdir(d.home+"/box/diff/a", 0o700))
	must(t, os.Mkdir(d.home+"/box/diff/b c", 0o700))
	for _, name := range []string{"a", "b c", "a"} {
		must(t, unix.Mount("left", d.home+"/box/diff/"+name, "tmpfs", 0, ""))
	}
	must(t, d.Remove("box"))
	d.trash.wait()
	if names := stagingNames(t, d); names != "[]" {
		t.Errorf("left in staging: %s", names)
	}
}
