package quota

import (
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/bcc2decd/overlay2/internal/sys"
)

// deviceName is the block device node that quotactl(2) needs on kernels before 5.14, in
// the home, by the name that Docker gives it.
const deviceName = "backingFsBlockDev"

// findDevice returns a path that leads to the block device of the filesystem of fd: a
// node in dir, as Docker has it, or what udev has made, or a node made now.
func findDevice(fd int, dir string) (string, error) {
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return "", err
	}
	dev := uint64(st.Dev)
	node := filepath.Join(dir, deviceName)
	udev := fmt.Sprintf("/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev))
	for _, path := range []string{node, udev} {
		if checkDevice(path, dev) == nil {
			return path, nil
		}
	}
	if err := makeDevice(fd, dev); err != nil {
		return "", fmt.Errorf("make block device node: %w", err)
	}
	return node, checkDevice(node, dev)
}

// checkDevice reports why path cannot be used as the block device dev; on a mount with
// nodev it cannot.
func checkDevice(path string, dev uint64) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := sys.Fstatat(unix.AT_FDCWD, path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || uint64(st.Rdev) != dev {
		return fmt.Errorf("%s: %w", path, unix.ENOTBLK)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return err
	}
	if fs.Flags&unix.ST_NODEV != 0 {
		return fmt.Errorf("%s is on a mount with nodev: %w", path, unix.EACCES)
	}
	return nil
}

// makeDevice makes the node in the home unless another process, or another Control of
// this one, has done so meanwhile. A node of another device, of a home that was copied, is
// replaced by a rename, so that there always is one.
func makeDevice(fd int, dev uint64) error {
	err := unix.Mknodat(fd, deviceName, unix.S_IFBLK|0o600, int(dev))
	if err != unix.EEXIST {
		return err
	}
	var st unix.Stat_t
	if err := sys.Fstatat(fd, deviceName, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK && uint64(st.Rdev) == dev {
		return nil
	}
	// Not the process id: it may be the same in two containers, and is in one process.
	tmp := deviceName + "." + rand.Text()
	if err := unix.Mknodat(fd, tmp, unix.S_IFBLK|0o600, int(dev)); err != nil {
		return err
	}
	if err := unix.Renameat(fd, tmp, fd, deviceName); err != nil {
		return errors.Join(err, unix.Unlinkat(fd, tmp, 0))
	}
	return nil
}
