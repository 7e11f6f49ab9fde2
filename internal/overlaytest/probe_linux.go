package overlaytest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// probe returns nil if the machine has what need names, otherwise why it has not. A
// name it does not know fails the test: a typing error must not skip it.
func probe(t testing.TB, need string) error {
	t.Helper()
	switch need {
	case "linux":
		return nil
	case "root":
		if uid := os.Geteuid(); uid != 0 {
			return fmt.Errorf("user id is %d", uid)
		}
		return nil
	case "proc":
		_, err := os.Readlink("/proc/self/fd/0")
		return err
	case "overlay":
		return probeOverlay(t)
	case "tmpfs", "ext4", "xfs", "btrfs":
		return probeFS(need)
	case "loop":
		return probeLoop()
	case "userns":
		return probeUserns()
	case "seccomp":
		return probeSeccomp()
	case "idmap":
		return probeIDMap(t)
	case "mknod":
		return unix.Mknod(filepath.Join(t.TempDir(), "null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3)))
	case "selinux":
		_, err := os.Stat("/sys/fs/selinux/enforce")
		return err
	case "dockerd":
		return probeDockerd()
	case "clients":
		if os.Getenv("OVERLAY2_TEST_CLIENTS") == "" {
			return errors.New("OVERLAY2_TEST_CLIENTS is not set")
		}
		return nil
	case "quota":
		return probeQuota(t, "xfs")
	case "quota-ext4":
		return probeQuota(t, "ext4")
	}
	if cmd, ok := strings.CutPrefix(need, "cmd:"); ok {
		_, err := exec.LookPath(cmd)
		return err
	}
	t.Fatalf("unknown need %q", need)
	return nil
}

func probeOverlay(t testing.TB) error {
	dir := t.TempDir()
	for _, name := range []string{"a", "b", "m"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			return err
		}
	}
	merged := filepath.Join(dir, "m")
	data := "lowerdir=" + escapeMount(filepath.Join(dir, "a")) + ":" + escapeMount(filepath.Join(dir, "b"))
	if err := unix.Mount("overlay", merged, "overlay", 0, data); err != nil {
		return fmt.Errorf("mount overlay: %w", err)
	}
	return unix.Unmount(merged, unix.MNT_DETACH)
}

// probeFS tells whether the kernel has the filesystem, without making one: mount(2) looks up
// the type, loading its module, before it looks at the device. A file in place of the mount
// point makes sure that nothing is ever mounted.
func probeFS(name string) error {
	if os.Getenv(dirEnv(name)) != "" {
		return nil
	}
	if os.Geteuid() != 0 {
		return errors.New("only root mounts")
	}
	if name == "tmpfs" {
		return nil
	}
	if err := unix.Mount("/dev/null", "/dev/null", name, 0, ""); err == unix.ENODEV {
		return fmt.Errorf("the kernel has no %s", name)
	}
	if _, err := exec.LookPath("mkfs." + name); err != nil {
		return err
	}
	return probeLoop()
}

// probeLoop asks for a free loop device, which also makes one if all are in use.
func probeLoop() error {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer ctl.Close()
	if _, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE); err != nil {
		return fmt.Errorf("no free loop device: %w", err)
	}
	return nil
}

// probeUserns starts this very test binary in a user namespace, to list no tests.
func probeUserns() error {
	cmd := exec.Command("/proc/self/exe", "-test.list=^$")
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: idMappings(),
		GidMappings: idMappings(),
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("start a process in a user namespace: %w: %s", err, out)
	}
	return nil
}

// probeIDMap asks for an idmapped mount of a temporary directory, with a map by which nothing
// is mapped: a kernel before 5.12, and a filesystem that cannot, refuse it in another way.
func probeIDMap(t testing.TB) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, t.TempDir(), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(fd)
	ns, err := os.Open("/proc/self/ns/user")
	if err != nil {
		return err
	}
	defer ns.Close()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	// The initial namespace is EPERM to a kernel that could with another.
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil && err != unix.EPERM {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	return nil
}

// quotaStat is struct fs_quota_statv of linux/dqblk_xfs.h: version and flags lead 160 bytes.
type quotaStat struct {
	version int8
	_       uint8
	flags   uint16
	_       [156]byte
}

// probeQuota mounts a filesystem with project quotas and asks whether they are enforced.
func probeQuota(t testing.TB, name string) error {
	if err := probeFS(name); err != nil {
		return err
	}
	fs := FS{Name: name, Options: "prjquota"}
	if name == "ext4" {
		fs.Mkfs = []string{"-O", "quota,project"}
	}
	dir, umount, err := mountFS(fs)
	if err != nil {
		return err
	}
	err = projectQuota(dir)
	return errors.Join(err, umount())
}

// projectQuota returns nil if limits of projects are enforced at dir.
func projectQuota(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	const xgetqstatv, project, enforced = 0x5808, 2, 0x20
	st := quotaStat{version: 1}
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, uintptr(fd), xgetqstatv<<8|project, 0, uintptr(unsafe.Pointer(&st)), 0, 0)
	if errno != 0 {
		return fmt.Errorf("quotactl_fd: %w", errno)
	}
	if st.flags&enforced == 0 {
		return fmt.Errorf("limits of projects are not enforced (flags %#x)", st.flags)
	}
	return nil
}
