package sys

import (
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ident tells a file from every other one that is or was: an inode number is used again
// after the file is gone, but not with the same time of birth.
type Ident struct {
	dev, ino   uint64
	birth      int64
	birthNsec  uint32
	mountID    uint64
	comparable bool
}

// Same reports whether two are surely of one file, seen through the same mount. Where the
// filesystem or the kernel doesn't keep the time of birth nothing is sure.
func (i Ident) Same(o Ident) bool { return i.comparable && i == o }

// SameFile is Same whatever the mounts: for one of a file that is held open it is sure without a time of birth too.
func (i Ident) SameFile(o Ident) bool {
	i.mountID, o.mountID = 0, 0
	return i == o
}

// identMask is what an Ident is made of.
const identMask = unix.STATX_TYPE | unix.STATX_INO | unix.STATX_BTIME | unix.STATX_MNT_ID

// Birth returns the time at which the file name beneath dirfd was made, of a symlink itself. It is false where
// the filesystem or the kernel (before Linux 4.11) doesn't keep it.
func Birth(dirfd int, name Name) (Time, bool, error) {
	var x unix.Statx_t
	for {
		_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(dirfd), uintptr(unsafe.Pointer(unsafe.SliceData(name))),
			unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_BTIME, uintptr(unsafe.Pointer(&x)), 0)
		runtime.KeepAlive(name)
		switch errno {
		case 0:
			return Time{x.Btime.Sec, x.Btime.Nsec}, x.Mask&unix.STATX_BTIME != 0, nil
		case unix.EINTR:
			continue
		case unix.ENOSYS, unix.EPERM: // a seccomp filter may not know statx: stat itself is never EPERM
			return Time{}, false, nil
		}
		return Time{}, false, errno
	}
}

// IdentDir returns the identity of the directory that name beneath dirfd, whose symlinks
// are followed, leads to. Something else is ENOTDIR.
func IdentDir(dirfd int, name Name) (Ident, error) {
	var x unix.Statx_t
	for {
		_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(dirfd), uintptr(unsafe.Pointer(unsafe.SliceData(name))),
			unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, identMask, uintptr(unsafe.Pointer(&x)), 0)
		runtime.KeepAlive(name)
		switch errno {
		case 0:
		case unix.EINTR:
			continue
		default:
			return Ident{}, errno
		}
		break
	}
	return identOf(&x)
}

// IdentFd is IdentDir of an open directory, O_PATH too.
func IdentFd(fd int) (Ident, error) {
	var x unix.Statx_t
	if err := retry(func() error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, identMask, &x)
	}); err != nil {
		return Ident{}, err
	}
	return identOf(&x)
}

func identOf(x *unix.Statx_t) (Ident, error) {
	if x.Mode&unix.S_IFMT != unix.S_IFDIR {
		return Ident{}, unix.ENOTDIR
	}
	return Ident{
		dev: unix.Mkdev(x.Dev_major, x.Dev_minor), ino: x.Ino, mountID: x.Mnt_id,
		birth: x.Btime.Sec, birthNsec: x.Btime.Nsec,
		comparable: x.Mask&unix.STATX_BTIME != 0 && x.Mask&unix.STATX_INO != 0,
	}, nil
}

// Lasting returns what of an identity is the same in every life of the machine: the inode number and the time of birth, 0
// where that is not known.
func (i Ident) Lasting() string { return fmt.Sprintf("%d.%d.%d", i.ino, i.birth, i.birthNsec) }

// DirInfo is what one look at a directory tells.
type DirInfo struct {
	Ident          Ident
	Mode, UID, GID uint32
}

// StatDir looks at the directory name beneath dirfd, or at dirfd itself if name is empty. A symlink is ENOTDIR. The Ident
// is the Same as no other where the kernel or the filesystem doesn't keep the time of birth.
func StatDir(dirfd int, name string) (DirInfo, error) {
	var x unix.Statx_t
	err := retry(func() error {
		return unix.Statx(dirfd, name, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC,
			identMask|unix.STATX_MODE|unix.STATX_UID|unix.STATX_GID, &x)
	})
	if err == unix.ENOSYS || err == unix.EPERM { // before 4.11, or a seccomp filter that does not know it
		var st unix.Stat_t
		err = Fstatat(dirfd, name, &st)
		x = unix.Statx_t{Mode: uint16(st.Mode), Uid: st.Uid, Gid: st.Gid, Ino: st.Ino, Dev_major: unix.Major(uint64(st.Dev)), Dev_minor: unix.Minor(uint64(st.Dev))}
	}
	if err != nil {
		return DirInfo{}, err
	}
	ident, err := identOf(&x)
	return DirInfo{Ident: ident, Mode: uint32(x.Mode), UID: x.Uid, GID: x.Gid}, err
}

// DirState tells whether anything in a directory may have changed: names in it, its own metadata, its
// own name, or that it was removed.
type DirState struct {
	dev, ino  uint64
	mountID   uint64 // of StateMounted
	ctime     int64
	ctimeNsec uint32
}

// StateFd returns the state of an open directory, O_PATH too. One that was removed is ENOENT.
func StateFd(fd int) (DirState, error) {
	var st unix.Stat_t
	if err := Fstat(fd, &st); err != nil {
		return DirState{}, err
	}
	if st.Nlink == 0 {
		return DirState{}, unix.ENOENT
	}
	return DirState{dev: uint64(st.Dev), ino: st.Ino, ctime: int64(st.Ctim.Sec), ctimeNsec: uint32(st.Ctim.Nsec)}, nil
}

// StateMounted is StateFd of a directory on the very mount that it was opened on, where the kernel tells (5.8, commit fa2fcf4f1df1).
func StateMounted(fd int) (DirState, error) {
	var x unix.Statx_t
	err := retry(func() error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_NLINK|unix.STATX_CTIME|unix.STATX_MNT_ID, &x)
	})
	switch {
	case err == unix.ENOSYS || err == unix.EPERM: // before 4.11, or a seccomp filter that does not know it
		return StateFd(fd)
	case err != nil:
		return DirState{}, err
	case x.Nlink == 0:
		return DirState{}, unix.ENOENT
	}
	s := DirState{dev: unix.Mkdev(x.Dev_major, x.Dev_minor), ino: x.Ino, ctime: x.Ctime.Sec, ctimeNsec: x.Ctime.Nsec}
	if x.Mask&unix.STATX_MNT_ID != 0 {
		s.mountID = x.Mnt_id
	}
	return s, nil
}

// SameDir reports whether two are of the same directory, as far as the numbers tell.
func (s DirState) SameDir(o DirState) bool {
	return s.dev == o.dev && s.ino == o.ino && s.mountID == o.mountID
}

// SettledAt reports whether the last change was at least d before now, a time before StateFd was called: then
// the next one will be seen, however coarse the filesystem's clock is. A d of 0 is for one that is not.
func (s DirState) SettledAt(now time.Time, d time.Duration) bool {
	return d == 0 || now.Sub(time.Unix(s.ctime, int64(s.ctimeNsec))) > d
}

// HasFineTimes reports whether each change of a directory that was looked at gives it another time of change:
// multigrain timestamps (6.13). Before, changes within a tick have the same. It makes and removes name in the
// open directory fd.
func HasFineTimes(fd int, name string) (bool, error) {
	before, err := StateFd(fd)
	if err != nil {
		return false, err
	}
	for range 3 { // a tick may fall in between once, or twice
		for _, change := range []func() error{
			func() error { return MkdiratMasked(fd, name, 0o700) },
			func() error { return Unlinkat(fd, name, unix.AT_REMOVEDIR) },
		} {
			if err := change(); err != nil {
				return false, err
			}
			now, err := StateFd(fd)
			if err != nil {
				return false, err
			}
			if now == before {
				return false, ignoreGone(Unlinkat(fd, name, unix.AT_REMOVEDIR))
			}
			before = now
		}
	}
	return true, nil
}
