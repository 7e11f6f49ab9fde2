package sys

import (
	"golang.org/x/sys/unix"
)

// cloneFlags make open_tree(2) return a mount of its own, in no mount table.
const cloneFlags = unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC

// CloneReadOnly returns a descriptor of a detached, read-only mount of the open directory
// (mount_setattr: 5.12, commit 2a1867219c7b).
func CloneReadOnly(dirfd int) (int, error) {
	return cloneAs(dirfd, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}

// CloneMapped returns a descriptor of a detached mount of the open directory on which owners
// are mapped as in the user namespace: an id on disk, taken for one in the namespace, is shown as what the namespace
// makes of it (5.12; an overlay takes it since 5.19,
// commit bc70682a497c; which filesystems can do it differs).
func CloneMapped(dirfd, userns int, readOnly bool) (int, error) {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns)}
	if readOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	return cloneAs(dirfd, attr)
}

// CloneNoDevices returns a descriptor of a detached mount of the open directory, with what is mounted beneath but
// for what is unbindable (mount_namespaces(7)). To open a device there is EACCES before its driver is asked.
func CloneNoDevices(dirfd int) (int, error) {
	return cloneWith(dirfd, unix.AT_RECURSIVE, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV})
}

func cloneAs(dirfd int, attr unix.MountAttr) (int, error) { return cloneWith(dirfd, 0, attr) }

func cloneWith(dirfd int, flags uint, attr unix.MountAttr) (int, error) {
	fd, err := unix.OpenTree(dirfd, "", cloneFlags|unix.AT_EMPTY_PATH|flags)
	if err != nil {
		return -1, &MountError{Call: "open_tree", Target: ProcPath(dirfd), Err: err}
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|flags, &attr); err != nil {
		_ = Close(fd)
		return -1, &MountError{Call: "mount_setattr", Target: ProcPath(dirfd), Err: err}
	}
	return fd, nil
}

// DetachedAt calls mount, which mounts something at target, and returns a descriptor of what
// it mounted, which is in no mount table: it does that on a thread with a mount namespace of its
// own, from which nothing propagates, and both end with the call. mount must stay on the thread.
func DetachedAt(target string, mount func() error) (fd int, err error) {
	fd = -1
	err = OnOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return &MountError{Call: "unshare", Target: "mount namespace", Err: err}
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return &MountError{Call: "make private", Target: "/", Err: err}
		}
		if err := mount(); err != nil {
			return err
		}
		var err error
		if fd, err = unix.OpenTree(unix.AT_FDCWD, target, cloneFlags); err != nil {
			return &MountError{Call: "open_tree", Target: target, Err: err}
		}
		return nil
	})
	return fd, err
}
