package overlaytest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fsEnv limits EachFS to a list of filesystems.
const fsEnv = "OVERLAY2_TEST_FS"

// dirEnv returns the variable that names a ready directory on the filesystem.
func dirEnv(name string) string { return "OVERLAY2_TEST_DIR_" + strings.ToUpper(name) }

// EachFS runs f as a subtest on ext4, tmpfs, xfs and btrfs, with an empty directory of
// each, mode 0755. The filesystem is made for the subtest alone and gone after it,
// whatever f left mounted there; leaving something mounted is an error.
func EachFS(t *testing.T, f func(t *testing.T, dir string)) {
	t.Helper()
	only := fields(os.Getenv(fsEnv))
	for _, name := range []string{"ext4", "tmpfs", "xfs", "btrfs"} {
		if len(only) > 0 && !slices.Contains(only, name) {
			continue
		}
		t.Run(name, func(t *testing.T) { f(t, MountFS(t, FS{Name: name})) })
	}
}

// FS describes a filesystem for MountFS.
type FS struct {
	// Name is ext4, tmpfs, xfs or btrfs.
	Name string
	// Size in bytes, 1 GiB if 0. Images are sparse: only what is written takes space.
	// xfs needs 300 MiB at least.
	Size int64
	// Options are those of mount, such as "prjquota" or "user_xattr".
	Options string
	// Mkfs are further arguments of mkfs.
	Mkfs []string
}

// MountFS makes a new filesystem and returns an empty directory on it that lives as
// long as the test. With OVERLAY2_TEST_DIR_... set, and a description that asks for nothing special,
// it is a new directory there. The test is skipped where Require would skip it.
func MountFS(t testing.TB, fs FS) string {
	t.Helper()
	Require(t, fs.Name)
	if !fs.given() && fs.Name != "tmpfs" {
		Require(t, "loop", "cmd:mkfs."+fs.Name)
	}
	dir, umount, err := mountFS(fs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, m := range mountsBelow(t, dir) {
			t.Errorf("left mounted: %s", m)
		}
		if err := umount(); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// given reports whether the environment names a directory that is as good as a new
// filesystem: those have project quotas where the kernel can.
func (fs FS) given() bool {
	plain := fs.Size == 0 && (fs.Options == "" || fs.Options == "prjquota") &&
		(len(fs.Mkfs) == 0 || slices.Equal(fs.Mkfs, []string{"-O", "quota,project"}))
	return plain && os.Getenv(dirEnv(fs.Name)) != ""
}

// mountFS makes and mounts fs; what it returns undoes all of it.
func mountFS(fs FS) (dir string, umount func() error, err error) {
	parent, given := "", fs.given()
	if given {
		parent = os.Getenv(dirEnv(fs.Name))
	}
	top, err := os.MkdirTemp(parent, fmt.Sprintf("overlaytest-%d-", os.Getpid()))
	if err != nil {
		return "", nil, err
	}
	undo := func() error { return errors.Join(umountBelow(top), os.RemoveAll(top)) }
	dir = filepath.Join(top, fs.Name)
	err = os.Mkdir(dir, 0o755)
	if err == nil && !given {
		err = mountNew(fs, dir)
	}
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("make %s: %w", fs.Name, err), undo())
	}
	if !given && fs.Name == "tmpfs" || given {
		return dir, undo, nil
	}
	// A fresh ext4 has lost+found; tests want nothing but their own.
	data := filepath.Join(dir, "data")
	if err := os.Mkdir(data, 0o755); err != nil {
		return "", nil, errors.Join(err, undo())
	}
	return data, undo, nil
}

// mountNew mounts a new filesystem at dir.
func mountNew(fs FS, dir string) error {
	if fs.Size == 0 {
		fs.Size = 1 << 30
	}
	if fs.Name == "tmpfs" {
		data := fmt.Sprintf("mode=0755,size=%d", fs.Size)
		if fs.Options != "" {
			data += "," + fs.Options
		}
		return unix.Mount("tmpfs", dir, "tmpfs", 0, data)
	}
	img, err := image(fs.Size)
	if err != nil {
		return err
	}
	// The loop device holds the file; without a name a killed test leaves nothing behind.
	defer os.Remove(img)
	args := append(mkfsArgs(fs.Name), fs.Mkfs...)
	if out, err := exec.Command("mkfs."+fs.Name, append(args, img)...).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.%s: %w: %s", fs.Name, err, out)
	}
	dev, err := attach(img)
	if err != nil {
		return fmt.Errorf("attach a loop device: %w", err)
	}
	// The device detaches itself when the last user, the mount, is gone.
	defer dev.Close()
	if err := unix.Mount(dev.Name(), dir, fs.Name, 0, fs.Options); err != nil {
		return fmt.Errorf("mount %s: %w", dev.Name(), err)
	}
	return nil
}

// mkfsArgs are what makes each filesystem quickly and quietly.
func mkfsArgs(name string) []string {
	if name == "ext4" {
		return []string{"-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"}
	}
	return []string{"-q", "-f"}
}

// image makes a sparse file, in memory if there is a tmpfs for it.
func image(size int64) (string, error) {
	var st unix.Statfs_t
	dir := "/dev/shm"
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		dir = ""
	}
	f, err := os.CreateTemp(dir, fmt.Sprintf("overlaytest-%d-*.img", os.Getpid()))
	if err != nil {
		return "", err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}

// attach binds img to a free loop device, which frees itself after its last close.
func attach(img string) (*os.File, error) {
	file, err := os.OpenFile(img, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	for range 100 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, err
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		cfg := unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], filepath.Base(img))
		if err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg); err == nil {
			return dev, nil
		}
		dev.Close()
		// Somebody else took the device between the two calls: ask for another.
		if err != unix.EBUSY {
			return nil, err
		}
	}
	return nil, unix.EBUSY
}
