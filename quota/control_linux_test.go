package quota

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// each runs f on xfs and ext4 with project quotas, in an empty home.
func each(t *testing.T, f func(t *testing.T, home string)) {
	for name, need := range map[string]string{"xfs": "quota", "ext4": "quota-ext4"} {
		t.Run(name, func(t *testing.T) {
			overlaytest.Require(t, "root", need)
			f(t, mount(t, name))
		})
	}
}

// mount returns an empty directory on a filesystem with project quotas.
func mount(t *testing.T, name string) string {
	desc := overlaytest.FS{Name: name, Options: "prjquota"}
	if name == "ext4" {
		desc.Mkfs = []string{"-O", "quota,project"}
	}
	return overlaytest.MountFS(t, desc)
}

func open(t *testing.T, home string) *Control {
	t.Helper()
	c, err := Open(home)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// speak returns what c speaks to the kernel with, for a test that goes past c.
func speak(t *testing.T, c *Control) kernel {
	t.Helper()
	fd, err := openDir(c.home)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return kernel{fd: fd, device: c.device}
}

// subdir makes a new directory whose limits, if it gets any, are lifted at the end: the
// filesystem may live longer than the test.
func subdir(t *testing.T, c *Control, home, name string) string {
	t.Helper()
	dir := filepath.Join(home, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Clear(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	})
	return dir
}

func projectID(t *testing.T, dir string) uint32 {
	t.Helper()
	x := xattrOf(t, dir)
	return x.projid
}

func xattrOf(t *testing.T, dir string) fsxattr {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	x, err := getXattr(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func setProject(t *testing.T, dir string, id, flags uint32) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := setXattr(int(f.Fd()), fsxattr{projid: id, xflags: flags}); err != nil {
		t.Fatal(err)
	}
}

// unprivileged runs f without CAP_SYS_RESOURCE, which ext4 lets pass every limit.
func unprivileged(t *testing.T, f func()) {
	t.Helper()
	overlaytest.WithoutCap(t, unix.CAP_SYS_RESOURCE, f)
}

func full(err error) bool { return errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOSPC) }

func TestBytesAreLimited(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		c := open(t, home)
		dir := subdir(t, c, home, "layer")
		limits := Limits{Bytes: 8 << 20}
		if err := c.Set(dir, limits); err != nil {
			t.Fatal(err)
		}
		if got, u, err := c.Get(dir); err != nil || got != limits || u.Inodes != 1 {
			t.Fatalf("limits %+v usage %+v: %v", got, u, err)
		}
		if err := os.MkdirAll(filepath.Join(dir, "diff/a/b"), 0o755); err != nil {
			t.Fatal(err)
		}
		unprivileged(t, func() {
			if err := os.WriteFile(filepath.Join(dir, "diff/a/b/fits"), make([]byte, 4<<20), 0o644); err != nil {
				t.Error(err)
			}
			if err := writeSync(filepath.Join(dir, "diff/a/b/too-much"), 6<<20); !full(err) {
				t.Errorf("writing past the limit: %v", err)
			}
			if err := os.WriteFile(filepath.Join(home, "beside"), make([]byte, 12<<20), 0o644); err != nil {
				t.Errorf("outside of the project: %v", err)
			}
		})
		_, u, err := c.Get(dir)
		if err != nil || u.Bytes < 4<<20 || u.Bytes > limits.Bytes || u.Inodes != 6 {
			t.Errorf("usage %+v: %v", u, err)
		}
		if err := c.Resize(dir, Limits{Bytes: 32 << 20}); err != nil {
			t.Fatal(err)
		}
		unprivileged(t, func() {
			if err := writeSync(filepath.Join(dir, "diff/a/b/too-much"), 6<<20); err != nil {
				t.Errorf("after Resize: %v", err)
			}
		})
	})
}

func writeSync(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, size))
	return errors.Join(err, f.Sync(), f.Close())
}

func TestInodesAreLimited(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		c := open(t, home)
		dir := subdir(t, c, home, "layer")
		if err := c.Set(dir, Limits{Inodes: 10}); err != nil {
			t.Fatal(err)
		}
		made := 1
		unprivileged(t, func() {
			for ; made < 20; made++ {
				if err := os.Mkdir(filepath.Join(dir, fmt.Sprint(made)), 0o755); err != nil {
					if !full(err) {
						t.Error(err)
					}
					return
				}
			}
		})
		if made != 10 {
			t.Errorf("%d inodes fit into 10", made)
		}
	})
}

// TestThroughOverlay has the limit hold for root in a mount, where overlayfs drops the
// capability that would pass it, and copy-up and whiteouts work within one project.
func TestThroughOverlay(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		overlaytest.Require(t, "overlay")
		c := open(t, home)
		lower := subdir(t, c, home, "lower")
		overlaytest.Build(t, lower, "file big size=2M data=0:\"x\"\nfile gone\ndir d\nfile d/f")
		dir := subdir(t, c, home, "layer")
		if err := c.Set(dir, Limits{Bytes: 8 << 20, Inodes: 50}); err != nil {
			t.Fatal(err)
		}
		m := overlaytest.Mount(t, []string{lower}, dir+"/diff", dir+"/work", filepath.Join(home, "merged"))
		if err := os.Chmod(filepath.Join(m.Merged, "big"), 0o600); err != nil {
			t.Errorf("copy up: %v", err)
		}
		if err := errors.Join(os.Remove(filepath.Join(m.Merged, "gone")), os.RemoveAll(filepath.Join(m.Merged, "d")), os.Mkdir(filepath.Join(m.Merged, "d"), 0o755)); err != nil {
			t.Errorf("whiteout: %v", err)
		}
		if err := writeSync(filepath.Join(m.Merged, "much"), 16<<20); !full(err) {
			t.Errorf("writing past the limit: %v", err)
		}
		if err := os.Remove(filepath.Join(m.Merged, "much")); err != nil {
			t.Error(err)
		}
		m.Unmount()
		if id := projectID(t, filepath.Join(dir, "diff/big")); id != projectID(t, dir) {
			t.Errorf("copied file has project %d, the layer %d", id, projectID(t, dir))
		}
	})
}

func TestBadInputChangesNothing(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		c := open(t, home)
		dir := subdir(t, c, home, "layer")
		before := xattrOf(t, dir)
		for name, l := range map[string]Limits{
			"nothing":           {},
			"larger than disk":  {Bytes: 1 << 50},
			"soft too large":    {SoftBytes: 1 << 50},
			"largest number":    {Bytes: 1<<64 - 1},
			"soft above hard":   {Bytes: 1 << 20, SoftBytes: 2 << 20},
			"inodes soft above": {Inodes: 5, SoftInodes: 6},
		} {
			if err := c.Set(dir, l); !errors.Is(err, ErrInvalidLimit) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := c.Set(filepath.Join(home, "none"), Limits{Bytes: 1 << 20}); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("missing directory: %v", err)
		}
		if err := c.Set("/proc", Limits{Bytes: 1 << 20}); !errors.Is(err, unix.EXDEV) {
			t.Errorf("other filesystem: %v", err)
		}
		if err := os.Symlink(dir, filepath.Join(home, "link")); err != nil {
			t.Fatal(err)
		}
		if err := c.Set(filepath.Join(home, "link"), Limits{Bytes: 1 << 20}); err == nil {
			t.Error("a symlink was followed")
		}
		if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := c.Set(dir, Limits{Bytes: 1 << 20}); !errors.Is(err, unix.ENOTEMPTY) {
			t.Errorf("directory with an entry: %v", err)
		}
		if _, _, err := c.Get(dir); !errors.Is(err, ErrNoProject) {
			t.Errorf("Get without a project: %v", err)
		}
		if err := c.Resize(dir, Limits{Bytes: 1 << 20}); !errors.Is(err, ErrNoProject) {
			t.Errorf("Resize without a project: %v", err)
		}
		if err := c.Clear(dir); err != nil {
			t.Errorf("Clear without a project: %v", err)
		}
		if after := xattrOf(t, dir); after.projid != before.projid || after.xflags != before.xflags {
			t.Errorf("directory changed from %+v to %+v", before, after)
		}
	})
}

func TestBelowUsage(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		c := open(t, home)
		dir := subdir(t, c, home, "layer")
		limits := Limits{Bytes: 8 << 20, Inodes: 100, SoftBytes: 6 << 20, SoftInodes: 50}
		if err := c.Set(dir, limits); err != nil {
			t.Fatal(err)
		}
		if err := writeSync(filepath.Join(dir, "f"), 4<<20); err != nil {
			t.Fatal(err)
		}
		for _, l := range []Limits{{Bytes: 2 << 20}, {Inodes: 1}} {
			if err := c.Resize(dir, l); !errors.Is(err, ErrBelowUsage) {
				t.Errorf("%+v: %v", l, err)
			}
		}
		if got, _, err := c.Get(dir); err != nil || got != limits {
			t.Errorf("limits are %+v, want %+v: %v", got, limits, err)
		}
	})
}

// TestSetTooSmall has a limit that the empty directory itself exceeds, on ext4: the
// directory must come out without a project and its id free.
func TestSetTooSmall(t *testing.T) {
	overlaytest.Require(t, "root", "quota-ext4")
	home := mount(t, "ext4")
	c := open(t, home)
	dir := subdir(t, c, home, "layer")
	if err := c.Set(dir, Limits{Bytes: 512}); !errors.Is(err, ErrBelowUsage) {
		t.Fatal(err)
	}
	if x := xattrOf(t, dir); x.projid != 0 || x.xflags&xflagProjinherit != 0 {
		t.Errorf("left with %+v", x)
	}
	if err := c.Set(dir, Limits{Bytes: 1 << 20}); err != nil {
		t.Error(err)
	}
}

func TestIDIsFreedAndUsedAgain(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		c := open(t, home)
		dir := subdir(t, c, home, "a")
		if err := c.Set(dir, Limits{Bytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		id := projectID(t, dir)
		if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := c.Clear(dir); err != nil {
			t.Fatal(err)
		}
		if l, u, err := c.Get(dir); err != nil || l != (Limits{}) || u.Inodes != 2 {
			t.Errorf("after Clear: %+v %+v %v", l, u, err)
		}
		// While a file still has the id nobody else may get it.
		other := subdir(t, c, home, "b")
		if err := c.Set(other, Limits{Bytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		if projectID(t, other) == id {
			t.Fatalf("id %d is used twice", id)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		// xfs counts a deleted inode for a while.
		for i := 0; ; i++ {
			next := subdir(t, c, home, fmt.Sprint("c", i))
			if err := c.Set(next, Limits{Bytes: 1 << 20}); err != nil {
				t.Fatal(err)
			}
			if projectID(t, next) == id {
				break
			}
			if i == 100 {
				t.Fatalf("id %d never came again", id)
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
}

// TestForeignIDs has ids in use by an administrator: with files, with limits only, with a
// name only.
func TestForeignIDs(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		const base = 70000
		setProject(t, home, base, 0)
		c := open(t, home)
		c.noted = map[uint32]bool{base + 3: true}
		k := speak(t, c)
		files := subdir(t, c, home, "admin")
		setProject(t, files, base+2, xflagProjinherit) // base+1 is Docker's
		if err := k.set(base+4, Limits{Bytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := k.set(base+4, Limits{}); err != nil {
				t.Error(err)
			}
		})
		dir := subdir(t, c, home, "layer")
		if err := c.Set(dir, Limits{Bytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		if id := projectID(t, dir); id != base+5 {
			t.Errorf("got id %d, want %d", id, base+5)
		}
		if err := c.Set(files, Limits{Bytes: 1 << 20}); !errors.Is(err, ErrHasProject) {
			t.Errorf("Set on an administrator's directory: %v", err)
		}
		setProject(t, home, 0, 0)
	})
}

// TestClearSparesTheHome has a directory that shares the home's project: its limits are not ours.
func TestClearSparesTheHome(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		const base = 80000
		setProject(t, home, base, 0)
		defer setProject(t, home, 0, 0)
		c := open(t, home)
		limits := Limits{Bytes: 64 << 20}
		k := speak(t, c)
		if err := k.set(base, limits); err != nil {
			t.Fatal(err)
		}
		dir := subdir(t, c, home, "layer")
		setProject(t, dir, base, xflagProjinherit)
		if err := c.Clear(dir); err != nil {
			t.Fatal(err)
		}
		q, err := k.get(base)
		if err != nil || q.blkHard*basicBlock != limits.Bytes {
			t.Errorf("limit of the home's project is %d: %v", q.blkHard*basicBlock, err)
		}
		if err := k.set(base, Limits{}); err != nil {
			t.Error(err)
		}
	})
}

// TestManyAtOnce has goroutines of two Controls, as of two processes with two homes on one
// filesystem, take ids at the same time.
func TestManyAtOnce(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		const n = 40
		var wg sync.WaitGroup
		var dirs []string
		for _, sub := range []string{"one", "two"} {
			if err := os.Mkdir(filepath.Join(home, sub), 0o755); err != nil {
				t.Fatal(err)
			}
			c := open(t, filepath.Join(home, sub))
			for i := range n {
				dir := subdir(t, c, filepath.Join(home, sub), fmt.Sprint(i))
				dirs = append(dirs, dir)
				wg.Go(func() {
					if err := c.Set(dir, Limits{Bytes: 1 << 20}); err != nil {
						t.Error(err)
					}
				})
			}
		}
		wg.Wait()
		seen := map[uint32]string{}
		for _, dir := range dirs {
			id := projectID(t, dir)
			if other, ok := seen[id]; ok || id == 0 {
				t.Errorf("%s and %s have project %d", dir, other, id)
			}
			seen[id] = dir
		}
	})
}

// TestDeviceNode goes the way of kernels before 5.14.
func TestDeviceNode(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		c := open(t, home)
		var err error
		if c.device, err = findDevice(speak(t, c).fd, home); err != nil {
			t.Fatal(err)
		}
		dir := subdir(t, c, home, "layer")
		limits := Limits{Bytes: 1 << 20, Inodes: 5}
		if err := c.Set(dir, limits); err != nil {
			t.Fatal(err)
		}
		if got, u, err := c.Get(dir); err != nil || got != limits || u.Inodes != 1 {
			t.Errorf("%+v %+v %v", got, u, err)
		}
		if flags, err := speak(t, c).state(); err != nil || flags&projectEnforced == 0 {
			t.Errorf("flags %#x: %v", flags, err)
		}
	})
}

func TestDeviceNodeIsMadeOnce(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		c := open(t, home)
		if err := makeDevice(speak(t, c).fd, c.dev); err != nil {
			t.Fatal(err)
		}
		node := filepath.Join(home, deviceName)
		if err := checkDevice(node, c.dev); err != nil {
			t.Fatal(err)
		}
		if path, err := findDevice(speak(t, c).fd, home); err != nil || path != node {
			t.Errorf("found %q: %v", path, err)
		}
		if err := checkDevice(node, c.dev+1); !errors.Is(err, unix.ENOTBLK) {
			t.Errorf("other device: %v", err)
		}
	})
}

func TestReadOnly(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		c := open(t, home)
		dir := subdir(t, c, home, "layer")
		if err := c.Set(dir, Limits{Bytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		fresh := subdir(t, c, home, "fresh")
		if err := unix.Mount(home, home, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := unix.Unmount(home, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}()
		if err := unix.Mount("", home, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		ro := open(t, home)
		if err := ro.Set(fresh, Limits{Bytes: 1 << 20}); !errors.Is(err, unix.EROFS) {
			t.Errorf("Set: %v", err)
		}
		if err := ro.Resize(dir, Limits{Bytes: 2 << 20}); !errors.Is(err, unix.EROFS) {
			t.Errorf("Resize: %v", err)
		}
		if l, _, err := ro.Get(dir); err != nil || l.Bytes != 1<<20 {
			t.Errorf("Get: %+v %v", l, err)
		}
		if x := xattrOf(t, fresh); x.projid != 0 {
			t.Errorf("half set: %+v", x)
		}
	})
}

func TestHoldsNothingOpen(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		overlaytest.NoLeaks(t)
		c := open(t, home)
		dir := subdir(t, c, home, "layer")
		if _, _, err := c.Get(dir); !errors.Is(err, ErrNoProject) {
			t.Error(err)
		}
		if err := errors.Join(c.Set(dir, Limits{Inodes: 9}), c.Resize(dir, Limits{Inodes: 8})); err != nil {
			t.Error(err)
		}
		if err := c.Set(dir, Limits{Bytes: 1 << 20}); !errors.Is(err, ErrHasProject) {
			t.Error(err)
		}
	})
}

// TestOpenSaysWhatIsMissing needs no quotas: each message names the remedy.
func TestOpenSaysWhatIsMissing(t *testing.T) {
	overlaytest.Require(t, "root")
	for _, c := range []struct {
		fs   overlaytest.FS
		says string
	}{
		{overlaytest.FS{Name: "xfs", Options: "noquota"}, "mount it with -o prjquota"},
		{overlaytest.FS{Name: "xfs", Options: "usrquota"}, "mount it with -o prjquota"},
		{overlaytest.FS{Name: "ext4", Size: 64 << 20}, "-O quota,project"},
		{overlaytest.FS{Name: "btrfs"}, "need xfs or ext4"},
		{overlaytest.FS{Name: "tmpfs", Size: 1 << 20}, "need xfs or ext4"},
	} {
		t.Run(c.fs.Name+c.fs.Options, func(t *testing.T) {
			if c.fs.Options == "usrquota" {
				overlaytest.Require(t, "quota") // else the kernel refuses the option
			}
			dir := overlaytest.MountFS(t, c.fs)
			overlaytest.NoLeaks(t)
			_, err := Open(dir)
			if !errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %q does not say %q", err, c.says)
			}
		})
	}
}

// TestNotEnforced mounts what counts projects without limiting them.
func TestNotEnforced(t *testing.T) {
	for _, c := range []struct {
		need string
		fs   overlaytest.FS
	}{
		{"quota", overlaytest.FS{Name: "xfs", Options: "pqnoenforce"}},
		{"quota-ext4", overlaytest.FS{Name: "ext4", Size: 64 << 20, Mkfs: []string{"-O", "quota,project"}}},
	} {
		t.Run(c.fs.Name, func(t *testing.T) {
			overlaytest.Require(t, "root", c.need)
			_, err := Open(overlaytest.MountFS(t, c.fs))
			if !errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), "does not enforce") {
				t.Errorf("error %q", err)
			}
		})
	}
}

func TestHomeThatInherits(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		setProject(t, home, 5, xflagProjinherit)
		defer setProject(t, home, 0, 0)
		if _, err := Open(home); !errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), "chattr -P") {
			t.Errorf("error %q", err)
		}
	})
}

// userHomeEnv makes TestUserNamespace the half of itself that runs in a user namespace.
const userHomeEnv = "OVERLAY2_QUOTA_TEST_HOME"

func TestUserNamespace(t *testing.T) {
	if home := os.Getenv(userHomeEnv); home != "" {
		_, err := Open(home)
		if !errors.Is(err, ErrNotSupported) || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "user namespace") {
			t.Errorf("error %v", err)
		}
		return
	}
	each(t, func(t *testing.T, home string) {
		overlaytest.Require(t, "userns")
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestUserNamespace$", "-test.v")
		cmd.Env = append(os.Environ(), userHomeEnv+"="+home)
		cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestUserNamespace") {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// TestManyIDs takes an id when 10,000 are in use: Open must not look at them, the
// first Set may.
func TestManyIDs(t *testing.T) {
	each(t, func(t *testing.T, home string) {
		c := open(t, home)
		without := openTime(t, home)
		const first, n = 1000, 10000
		k := speak(t, c)
		setProject(t, home, first-2, 0)
		t.Cleanup(func() {
			setProject(t, home, 0, 0)
			for id := uint32(first); id < first+n; id++ {
				if err := k.set(id, Limits{}); err != nil {
					t.Error(err)
				}
			}
		})
		for id := uint32(first); id < first+n; id++ {
			if err := k.set(id, Limits{Bytes: 1 << 20}); err != nil {
				t.Fatal(err)
			}
		}
		with := openTime(t, home)
		second := open(t, home)
		opened := time.Now()
		dir := subdir(t, second, home, "layer")
		if err := second.Set(dir, Limits{Bytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		t.Logf("Open took %v, %v before; the first Set %v", with, without, time.Since(opened))
		if with-without > 50*time.Millisecond {
			t.Errorf("Open took %v with %d ids in use, %v before", with, n, without)
		}
		if id := projectID(t, dir); id != first+n {
			t.Errorf("id %d, want %d", id, first+n)
		}
	})
}

// openTime is how long Open takes: the least of several, as others use the processors too.
func openTime(t *testing.T, home string) time.Duration {
	t.Helper()
	least := time.Hour
	for range 10 {
		start := time.Now()
		open(t, home)
		least = min(least, time.Since(start))
	}
	return least
}
