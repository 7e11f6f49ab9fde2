//go:build amd64 || arm64

package sys

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// StatName returns the metadata of name beneath dirfd, of a symlink itself.
//
// Where struct stat has 64 bits for everything, fstatat is a sixth faster than statx, which
// has more than twice as much to copy.
func StatName(dirfd int, name Name, st *Stat) error {
	var o unix.Stat_t
	for {
		_, _, errno := unix.Syscall6(sysFstatat, uintptr(dirfd), uintptr(unsafe.Pointer(unsafe.SliceData(name))),
			uintptr(unsafe.Pointer(&o)), unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, 0)
		runtime.KeepAlive(name)
		switch errno {
		case 0:
			*st = FromStat(&o)
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}

// StatFd returns the metadata of an open descriptor.
func StatFd(fd int, st *Stat) error {
	var o unix.Stat_t
	if err := Fstat(fd, &o); err != nil {
		return err
	}
	*st = FromStat(&o)
	return nil
}
