// Package quota limits what a directory tree may take of its filesystem, by the
// project quotas of xfs and ext4, in pure Go.
//
// A project is a number kept in the inode of each file; the filesystem counts blocks
// and inodes by project and refuses what would go over a limit. A directory with the
// flag PROJINHERIT hands its project on to everything made in it, so one call on an
// empty directory covers the tree that grows there.
//
// # Ids
//
// Ids belong to the filesystem, not to a home: two homes, or an administrator, may use
// ids on the same one. Control keeps no table of its own. An id is free if the kernel
// knows of no inode and no limit with it (Q_XGETNEXTQUOTA, Linux 4.6); it is taken by
// giving it to the directory, and the kernel's count of inodes then tells whether
// somebody else took it in the same moment: with more than the one inode both let go
// and look further. So no lock file is needed, a crash leaves nothing to mend, and an
// id becomes free by itself when the last file with it is gone and Clear has zeroed its
// limits. As Docker does, ids are taken from above the id of the home itself, which
// lets an administrator give each home a range; all but the first one there, whose limit
// Docker lifts whenever it starts, to see whether it can.
//
// # What a limit is worth
//
// xfs answers ENOSPC at a project's limit, ext4 EDQUOT. On ext4 a process with
// CAP_SYS_RESOURCE is not limited (overlayfs drops that capability for what is written
// through a mount); Get tells afterwards. A process that is root outside of a user
// namespace can set the project of its own files to 0 and so leave the count, unless
// seccomp denies it the ioctl.
package quota

import "errors"

// Limits is what a project may hold. Zero means no limit.
type Limits struct {
	// Bytes is the hard limit on disk space, in bytes of allocated blocks, directories
	// included. It is rounded up to 512 bytes, by xfs to a block of the filesystem.
	Bytes uint64
	// Inodes is the hard limit on files, directories and all other inodes; the
	// directory itself counts as one.
	Inodes uint64
	// SoftBytes and SoftInodes may be exceeded for the filesystem's grace period, seven
	// days if nobody changed it, and bind like the hard limits from then on.
	SoftBytes  uint64
	SoftInodes uint64
}

// Usage is what a project holds.
type Usage struct {
	// Bytes is the space of allocated blocks, directories included. xfs counts space it
	// has reserved for data not yet written, and lags behind a deletion by some 100 ms.
	Bytes uint64
	// Inodes is the number of inodes, the directory itself included.
	Inodes uint64
}

var (
	// ErrNotSupported says that project quotas cannot be used here; the error that wraps
	// it says why and what to do. It is also errors.ErrUnsupported.
	ErrNotSupported error = notSupported{}
	// ErrNoProject says that a directory has no project of its own, so no limit.
	ErrNoProject = errors.New("directory has no quota project of its own")
	// ErrHasProject says that a directory already has a project, which some
	// administrator or an earlier Set gave it.
	ErrHasProject = errors.New("directory already has a quota project")
	// ErrInvalidLimit says that limits cannot be meant: none at all, soft above hard,
	// more than the filesystem holds.
	ErrInvalidLimit = errors.New("invalid quota limit")
	// ErrBelowUsage says that the tree already holds more than the limit would allow.
	ErrBelowUsage = errors.New("quota limit is below current usage")
)

type notSupported struct{}

func (notSupported) Error() string        { return "project quotas are not supported" }
func (notSupported) NotSupported()        {}
func (notSupported) Is(target error) bool { return target == errors.ErrUnsupported }
