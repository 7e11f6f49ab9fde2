package sys

import (
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MkdiratMasked makes a directory and leaves its mode to the umask; the caller opens it
// and sets the mode by handle.
func MkdiratMasked(dirfd int, name string, mode uint32) error {
	return retry(func() error { return unix.Mkdirat(dirfd, name, mode) })
}

// Mknodat makes a device, fifo or whiteout; its mode is subject to the umask.
func Mknodat(dirfd int, name string, mode uint32, dev uint64) error {
	return retry(func() error { return unix.Mknodat(dirfd, name, mode, int(dev)) })
}

// Symlinkat makes name beneath dirfd a symlink to target.
func Symlinkat(target string, dirfd int, name string) error {
	return retry(func() error { return unix.Symlinkat(target, dirfd, name) })
}

// Linkat makes newname another name of oldname, of a symlink itself.
func Linkat(olddir int, oldname string, newdir int, newname string) error {
	return retry(func() error { return unix.Linkat(olddir, oldname, newdir, newname, 0) })
}

// Unlinkat removes a name that is no directory, or with unix.AT_REMOVEDIR an empty directory.
func Unlinkat(dirfd int, name string, flags int) error {
	return retry(func() error { return unix.Unlinkat(dirfd, name, flags) })
}

// Fchown sets the owner of an open file.
func Fchown(fd int, uid, gid uint32) error {
	return retry(func() error { return unix.Fchown(fd, int(uid), int(gid)) })
}

// Lchownat sets the owner of name beneath dirfd, of a symlink itself.
func Lchownat(dirfd int, name string, uid, gid uint32) error {
	return retry(func() error {
		return unix.Fchownat(dirfd, name, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW)
	})
}

// Fchmod sets the mode of an open file.
func Fchmod(fd int, mode uint32) error {
	return retry(func() error { return unix.Fchmod(fd, mode) })
}

// Lutimesat sets atime and mtime of name beneath dirfd, of a symlink itself.
func Lutimesat(dirfd int, name string, times *[2]unix.Timespec) error {
	return retry(func() error { return unix.UtimesNanoAt(dirfd, name, times[:], unix.AT_SYMLINK_NOFOLLOW) })
}

// Futimens sets atime and mtime of an open file. It is utimensat with a null path,
// which older kernels have as well, unlike AT_EMPTY_PATH there (Linux 5.8).
func Futimens(fd int, times *[2]unix.Timespec) error {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(times)), 0, 0, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// Ftruncate sets the length of an open file.
func Ftruncate(fd int, size int64) error {
	return retry(func() error { return unix.Ftruncate(fd, size) })
}

// PwriteFull writes all of buf at an offset.
func PwriteFull(fd int, buf []byte, offset int64) error {
	for len(buf) > 0 {
		n, err := unix.Pwrite(fd, buf, offset)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		buf, offset = buf[n:], offset+int64(n)
	}
	return nil
}

// OpenPathat returns an O_PATH handle of name beneath dirfd, whatever it is, without
// opening it: a device or fifo notices nothing, a symlink is not followed.
func OpenPathat(dirfd int, name string) (int, error) {
	return Openat(dirfd, name, unix.O_PATH, 0)
}

// Fsetxattr sets an extended attribute of an open file.
func Fsetxattr(fd int, attr string, value []byte) error {
	return retry(func() error { return unix.Fsetxattr(fd, attr, value, 0) })
}

// Fremovexattr removes an extended attribute of an open file.
func Fremovexattr(fd int, attr string) error {
	return retry(func() error { return unix.Fremovexattr(fd, attr) })
}

// SetxattrPath sets an extended attribute of what an O_PATH handle stands for.
func SetxattrPath(fd int, attr string, value []byte) error {
	path := ProcPath(fd)
	return retry(func() error { return unix.Setxattr(path, attr, value, 0) })
}

// RemovexattrPath removes an extended attribute of what an O_PATH handle stands for.
func RemovexattrPath(fd int, attr string) error {
	path := ProcPath(fd)
	return retry(func() error { return unix.Removexattr(path, attr) })
}

// ChmodPath sets the mode of what an O_PATH handle stands for, without opening it.
// Not for a symlink, which has none.
func ChmodPath(fd int, mode uint32) error {
	path := ProcPath(fd)
	return retry(func() error { return unix.Chmod(path, mode) })
}

// Timespec converts a time; where the kernel's seconds have 32 bits (386, arm), one that
// does not fit becomes the nearest that does. Filesystems clamp to their range the same way.
func Timespec(sec, nsec int64) unix.Timespec {
	var ts unix.Timespec
	ts.Sec = clampTo(ts.Sec, sec)
	ts.Nsec = clampTo(ts.Nsec, nsec)
	return ts
}

// clampTo returns n as T, the type of the first argument.
func clampTo[T ~int32 | ~int64](_ T, n int64) T {
	if v := T(n); int64(v) == n {
		return v
	}
	most := ^T(0) ^ (T(1) << (unsafe.Sizeof(T(0))*8 - 1))
	if n < 0 {
		return -most - 1
	}
	return most
}

// Seek sets the position of an open file or directory.
func Seek(fd int, offset int64) error {
	_, err := unix.Seek(fd, offset, io.SeekStart)
	return err
}

// FchownPath sets the owner of what an O_PATH handle stands for, of a symlink itself.
func FchownPath(fd int, uid, gid uint32) error {
	return retry(func() error {
		return unix.Fchownat(fd, "", int(uid), int(gid), unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
	})
}

// FgetxattrSize returns the size of an extended attribute of an open file.
func FgetxattrSize(fd int, attr string) (int, error) {
	for {
		n, err := unix.Fgetxattr(fd, attr, nil)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// Dup returns a second handle.
func Dup(fd int) (int, error) {
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
}

// IsOverlay says whether an open file is on a mounted overlay.
func IsOverlay(fd int) (bool, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(fd, &st) }); err != nil {
		return false, err
	}
	return int64(st.Type) == unix.OVERLAYFS_SUPER_MAGIC, nil
}
