package quota

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernel speaks quotactl for one filesystem. It is a value: nothing is held open
// between calls.
type kernel struct {
	fd     int    // an open directory on the filesystem
	device string // path of its block device for quotactl(2); "" to use quotactl_fd(2)
}

// hasQuotactlFd reports whether the kernel has quotactl_fd(2) (5.14, commit
// 64c2c2c62f92): it looks at the descriptor first.
func hasQuotactlFd() bool {
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, ^uintptr(0), cmdState, 0, 0, 0, 0)
	return errno != unix.ENOSYS
}

// call makes one quotactl call. arg is a *diskQuota or *quotaState.
func (k kernel) call(cmd uint32, id uint32, arg unsafe.Pointer) error {
	var device *byte
	if k.device != "" {
		var err error
		if device, err = unix.BytePtrFromString(k.device); err != nil {
			return err
		}
	}
	for {
		var errno unix.Errno
		if device != nil {
			_, _, errno = unix.Syscall6(unix.SYS_QUOTACTL, uintptr(cmd), uintptr(unsafe.Pointer(device)), uintptr(id), uintptr(arg), 0, 0)
		} else {
			_, _, errno = unix.Syscall6(unix.SYS_QUOTACTL_FD, uintptr(k.fd), uintptr(cmd), uintptr(id), uintptr(arg), 0, 0)
		}
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return errno
		}
	}
}

// state returns the flags projectAccounting and projectEnforced, 0 if the kernel, the
// filesystem or its mount knows no quotas.
func (k kernel) state() (uint16, error) {
	s := quotaState{version: quotaStateVersion}
	switch err := k.call(cmdState, 0, unsafe.Pointer(&s)); {
	case err == nil:
		return s.flags, nil
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ESRCH):
		return 0, nil
	default:
		return 0, err
	}
}

// get returns limits and usage of a project, all zero if the kernel knows nothing of it.
func (k kernel) get(id uint32) (diskQuota, error) {
	var q diskQuota
	err := k.call(cmdGet, id, unsafe.Pointer(&q))
	if errors.Is(err, unix.ENOENT) {
		return diskQuota{}, nil
	}
	return q, err
}

// next returns the first project at or above id that has inodes or limits; an error that
// noneLeft knows if there is none.
func (k kernel) next(id uint32) (uint32, error) {
	var q diskQuota
	err := k.call(cmdGetNext, id, unsafe.Pointer(&q))
	return q.id, err
}

// noneLeft reports whether next found no project: ENOENT is what xfs and ext4 return,
// ESRCH what quotactl(2) documents.
func noneLeft(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }

// set sets all four limits of a project, zero for none.
func (k kernel) set(id uint32, l Limits) error {
	q := diskQuota{
		version:   diskQuotaVersion,
		flags:     flagProject,
		fieldmask: fieldBlkHard | fieldBlkSoft | fieldInoHard | fieldInoSoft,
		id:        id,
		blkHard:   blocks(l.Bytes),
		blkSoft:   blocks(l.SoftBytes),
		inoHard:   l.Inodes,
		inoSoft:   l.SoftInodes,
	}
	return k.call(cmdSet, id, unsafe.Pointer(&q))
}

// blocks returns the number of basic blocks that hold n bytes.
func blocks(n uint64) uint64 {
	b := n / basicBlock
	if n%basicBlock != 0 {
		b++
	}
	return b
}

// getXattr returns the project and flags of an open file.
func getXattr(fd int) (fsxattr, error) {
	var x fsxattr
	err := ioctl(fd, ioctlGetXattr, &x)
	return x, err
}

// setXattr sets the project and flags of an open file.
func setXattr(fd int, x fsxattr) error { return ioctl(fd, ioctlSetXattr, &x) }

func ioctl(fd int, req uintptr, x *fsxattr) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(x)))
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return errno
		}
	}
}

// reservedIDs returns the projects that an administrator has named in /etc/projid
// (name:id) and /etc/projects (id:directory), which may have neither files nor limits
// yet. Files that cannot be read name none.
func reservedIDs() map[uint32]bool {
	ids := map[uint32]bool{}
	for _, f := range []struct {
		path  string
		field int
	}{{"/etc/projid", 1}, {"/etc/projects", 0}} {
		text, err := os.ReadFile(f.path)
		if err != nil {
			continue
		}
		parseReserved(ids, string(text), f.field)
	}
	return ids
}

// parseReserved adds the ids in the given field of lines "a:b", '#' starts a comment.
func parseReserved(ids map[uint32]bool, text string, field int) {
	for line := range strings.SplitSeq(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) <= field {
			continue
		}
		if id, err := strconv.ParseUint(strings.TrimSpace(fields[field]), 10, 32); err == nil {
			ids[uint32(id)] = true
		}
	}
}
