package overlaytest

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Overlay is a mounted overlay.
type Overlay struct {
	// Merged is where it is mounted.
	Merged string

	t testing.TB
}

// Mount mounts a real overlay at merged: lower nearest first, with upper and work empty
// a read-only one. Directories that don't exist are made (0755). Options are the kernel's, each as
// in "redirect_dir=on". It is unmounted when the test ends, if Unmount was not called.
func Mount(t testing.TB, lower []string, upper, work, merged string, options ...string) *Overlay {
	t.Helper()
	Require(t, "root", "overlay")
	for _, dir := range append(slices.Clone(lower), upper, work, merged) {
		if dir == "" {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	escaped := make([]string, len(lower))
	for i, dir := range lower {
		escaped[i] = escapeMount(dir)
	}
	data := "lowerdir=" + strings.Join(escaped, ":")
	if upper != "" {
		data += ",upperdir=" + escapeMount(upper) + ",workdir=" + escapeMount(work)
	}
	data = strings.Join(append([]string{data}, options...), ",")
	// Beyond a page the kernel cuts the data and may mount something else.
	if len(data) >= os.Getpagesize() {
		t.Fatalf("mount data of %d bytes does not fit into a page", len(data))
	}
	if err := unix.Mount("overlay", merged, "overlay", 0, data); err != nil {
		t.Fatalf("mount overlay (%s): %v", data, err)
	}
	o := &Overlay{Merged: merged, t: t}
	t.Cleanup(o.Unmount)
	return o
}

// Unmount unmounts the overlay, which must not be in use; what was written is in the
// upper directory then. Again it does nothing.
func (o *Overlay) Unmount() {
	o.t.Helper()
	if o.Merged == "" {
		return
	}
	err := unix.Unmount(o.Merged, unix.UMOUNT_NOFOLLOW)
	if err != nil {
		err = errors.Join(fmt.Errorf("unmount %s: %w", o.Merged, err), unix.Unmount(o.Merged, unix.MNT_DETACH))
		o.t.Error(err)
	}
	o.Merged = ""
}

// escapeMount makes a path safe within mount data.
func escapeMount(path string) string {
	return strings.NewReplacer(`\`, `\\`, ":", `\:`, ",", `\,`).Replace(path)
}

// mountPoints returns the mount points of this mount namespace in the order they were mounted.
func mountPoints() ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 4 {
			points = append(points, unescapeMountinfo(f[4]))
		}
	}
	return points, nil
}

// unescapeMountinfo turns the kernel's three octal digits into bytes again.
func unescapeMountinfo(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		var c byte
		if s[i] == '\\' && i+3 < len(s) {
			if _, err := fmt.Sscanf(s[i+1:i+4], "%03o", &c); err == nil {
				b.WriteByte(c)
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountsBelow returns the mount points strictly below dir, the latest first.
func mountsBelow(t testing.TB, dir string) []string {
	t.Helper()
	points, err := mountPoints()
	if err != nil {
		t.Error(err)
	}
	var below []string
	for _, p := range slices.Backward(points) {
		if strings.HasPrefix(p, dir+"/") {
			below = append(below, p)
		}
	}
	return below
}

// umountBelow unmounts whatever is mounted below top, the latest first.
func umountBelow(top string) error {
	points, err := mountPoints()
	if err != nil {
		return err
	}
	for _, p := range slices.Backward(points) {
		if !strings.HasPrefix(p, top+"/") {
			continue
		}
		// A mount point listed may be hidden below another that was just detached.
		if e := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); e != nil && e != unix.EINVAL && e != unix.ENOENT {
			err = errors.Join(err, fmt.Errorf("unmount %s: %w", p, e))
		}
	}
	return err
}

// idMappings gives a user namespace the ids of its maker: root maps all, others themselves.
func idMappings() []syscall.SysProcIDMap {
	if id := os.Geteuid(); id != 0 {
		return []syscall.SysProcIDMap{{ContainerID: 0, HostID: id, Size: 1}}
	}
	return []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
}
