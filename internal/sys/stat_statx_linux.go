//go:build !amd64 && !arm64

package sys

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// statMask is what Stat holds.
const statMask = unix.STATX_BASIC_STATS &^ unix.STATX_ATIME

// StatName returns the metadata of name beneath dirfd, of a symlink itself.
func StatName(dirfd int, name Name, st *Stat) error {
	return statx(dirfd, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, st)
}

// StatFd returns the metadata of an open descriptor.
func StatFd(fd int, st *Stat) error {
	return statx(fd, Name{0}, unix.AT_EMPTY_PATH, st)
}

func statx(dirfd int, name Name, flags int, st *Stat) error {
	var x unix.Statx_t
	for {
		_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(dirfd), uintptr(unsafe.Pointer(unsafe.SliceData(name))),
			uintptr(flags), statMask, uintptr(unsafe.Pointer(&x)), 0)
		runtime.KeepAlive(name)
		switch errno {
		case 0:
			*st = Stat{
				Dev: unix.Mkdev(x.Dev_major, x.Dev_minor), Ino: x.Ino, Size: int64(x.Size), Blocks: int64(x.Blocks),
				Mtime: Time{x.Mtime.Sec, x.Mtime.Nsec}, Ctime: Time{x.Ctime.Sec, x.Ctime.Nsec},
				Mode: uint32(x.Mode), Nlink: x.Nlink, UID: x.Uid, GID: x.Gid, Major: x.Rdev_major, Minor: x.Rdev_minor,
			}
			return nil
		case unix.EINTR:
			continue
		case unix.ENOSYS, unix.EPERM:
			// Linux before 4.11, or a seccomp filter from before it: stat itself is never EPERM.
			return statOld(dirfd, name, flags, st)
		}
		return errno
	}
}

func statOld(dirfd int, name Name, flags int, st *Stat) error {
	var o unix.Stat_t
	var err error
	if flags&unix.AT_EMPTY_PATH != 0 {
		err = Fstat(dirfd, &o)
	} else {
		err = Fstatat(dirfd, name.String(), &o)
	}
	if err != nil {
		return err
	}
	*st = FromStat(&o)
	return nil
}
