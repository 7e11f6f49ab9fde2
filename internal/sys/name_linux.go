package sys

import (
	"errors"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Name is one component of a path with the NUL that the kernel wants at its end, so that
// a walk that takes names from getdents gives them back without a copy.
type Name []byte

// MakeName adds the NUL to a string.
func MakeName(s string) Name { return append(append(make(Name, 0, len(s)+1), s...), 0) }

// String returns the name without the NUL; nil is empty.
func (n Name) String() string { return string(n[:max(len(n)-1, 0)]) }

// Time is a time of an inode: Nsec counts forward from Sec, before 1970 too.
type Time struct {
	Sec  int64
	Nsec uint32
}

// Stat is an inode's metadata, the same on every architecture.
type Stat struct {
	Dev, Ino     uint64
	Size         int64
	Blocks       int64 // of 512 bytes
	Mtime, Ctime Time
	Mode, Nlink  uint32
	UID, GID     uint32
	Major, Minor uint32 // of a device node
}

// Type returns the type bits of the mode.
func (s *Stat) Type() uint32 { return s.Mode & unix.S_IFMT }

// FromStat converts the C library's form of the metadata.
func FromStat(o *unix.Stat_t) Stat {
	// The fields' widths differ between architectures, hence the conversions.
	return Stat{
		Dev: uint64(o.Dev), Ino: o.Ino, Size: o.Size, Blocks: int64(o.Blocks),
		Mtime: Time{int64(o.Mtim.Sec), uint32(o.Mtim.Nsec)}, Ctime: Time{int64(o.Ctim.Sec), uint32(o.Ctim.Nsec)},
		Mode: o.Mode, Nlink: uint32(o.Nlink), UID: o.Uid, GID: o.Gid,
		Major: unix.Major(uint64(o.Rdev)), Minor: unix.Minor(uint64(o.Rdev)),
	}
}

// OpenName opens name beneath dirfd, with O_CLOEXEC and O_NOFOLLOW as Openat does.
func OpenName(dirfd int, name Name, flags int) (int, error) {
	flags |= unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_LARGEFILE
	for {
		fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(dirfd), uintptr(unsafe.Pointer(unsafe.SliceData(name))),
			uintptr(flags), 0, 0, 0)
		runtime.KeepAlive(name)
		switch errno {
		case 0:
			return int(fd), nil
		case unix.EINTR:
			continue
		}
		return -1, errno
	}
}

// ReadlinkName appends the target of the symlink name beneath dirfd to dst.
func ReadlinkName(dirfd int, name Name, dst []byte) ([]byte, error) {
	for free := 256; ; free *= 4 {
		for cap(dst)-len(dst) < free {
			dst = append(dst[:cap(dst)], 0)[:len(dst)]
		}
		buf := dst[len(dst):cap(dst)]
		n, _, errno := unix.Syscall6(unix.SYS_READLINKAT, uintptr(dirfd), uintptr(unsafe.Pointer(unsafe.SliceData(name))),
			uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), 0, 0)
		runtime.KeepAlive(name)
		if errno != 0 && errno != unix.EINTR {
			return dst, errno
		}
		if errno == 0 && int(n) < len(buf) {
			return dst[:len(dst)+int(n)], nil
		}
	}
}

// ListxattrName lists the names of name's own xattrs, a symlink's too, into buf. It takes
// listxattrat (Linux 6.13) or, before, the descriptor's name in /proc.
func ListxattrName(dirfd int, name Name, buf []byte) (int, error) {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_LISTXATTRAT, uintptr(dirfd), uintptr(unsafe.Pointer(unsafe.SliceData(name))),
			unix.AT_SYMLINK_NOFOLLOW, uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), 0)
		runtime.KeepAlive(name)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		case unix.ENOSYS, unix.EPERM:
			return llistxattr(ProcPath(dirfd)+"/"+name.String(), buf)
		}
		return 0, errno
	}
}

func llistxattr(path string, buf []byte) (int, error) {
	for {
		n, err := unix.Llistxattr(path, buf)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// OpenQuiet is OpenName for reading that leaves the access time alone where that is allowed:
// with relatime the first reader would make every inode dirty.
func OpenQuiet(dirfd int, name Name, flags int) (int, error) {
	fd, err := OpenName(dirfd, name, flags|unix.O_NOATIME)
	if errors.Is(err, unix.EPERM) {
		return OpenName(dirfd, name, flags)
	}
	return fd, err
}

// Pread fills buf once, at most, from offset on; 0 and nil is the end of the file.
func Pread(fd int, buf []byte, offset int64) (int, error) {
	for {
		n, err := unix.Pread(fd, buf, offset)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
