package sys

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Syncfs returns when all that was written to the filesystem of fd before is on its disk. Errors of
// that are told since Linux 5.8 (commit 735e4ae5ba28).
func Syncfs(fd int) error { return retry(func() error { return unix.Syncfs(fd) }) }

// Fsync returns when the file or directory is on the disk, with its metadata.
func Fsync(fd int) error { return retry(func() error { return unix.Fsync(fd) }) }

// Fdatasync returns when the file's content and length are on the disk.
func Fdatasync(fd int) error { return retry(func() error { return unix.Fdatasync(fd) }) }

// FSInstance names what is lost when power is: the filesystem of fd as it is mounted now,
// on the kernel that runs now. The same files have another name after a reboot and, on the
// filesystems that sysfs lists by device, after their device went away and came back: the inode
// number of such an entry is not used again (kernfs_new_node takes them in a cycle).
// It holds letters, digits and dots.
func FSInstance(fd int) (string, error) {
	data, err := ReadFileAt(unix.AT_FDCWD, "/proc/sys/kernel/random/boot_id", 64)
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	name := strings.ReplaceAll(strings.TrimSpace(string(data)), "-", "")
	var st unix.Stat_t
	if err := Fstat(fd, &st); err != nil {
		return "", err
	}
	device := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)))
	link, err := os.Readlink(device)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission):
		return name, nil // without a device of its own, as tmpfs and btrfs: the boot it is
	case err != nil:
		return "", err // another name than the last time would look like a power cut
	}
	for _, kind := range []string{"ext4", "xfs", "f2fs"} {
		switch err := unix.Stat(filepath.Join("/sys/fs", kind, filepath.Base(link)), &st); {
		case err == nil:
			return fmt.Sprintf("%s.%x", name, st.Ino), nil
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission):
			return "", fmt.Errorf("/sys/fs/%s: %w", kind, err)
		}
	}
	return name, nil
}

// RenameExchange swaps two names that both exist (Linux 3.15).
func RenameExchange(olddir int, oldname string, newdir int, newname string) error {
	return retry(func() error { return unix.Renameat2(olddir, oldname, newdir, newname, unix.RENAME_EXCHANGE) })
}
