package sys

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrNotRegular says that something else than a regular file stands at a name.
var ErrNotRegular = errors.New("not a regular file")

// ReadFileAt returns the content of the regular file name beneath dirfd. A symlink is
// not followed, a fifo does not block, and a file longer than limit bytes is an error.
func ReadFileAt(dirfd int, name string, limit int) (data []byte, err error) {
	// O_NONBLOCK: an open of a fifo would wait for a writer that never comes.
	fd, err := Openat(dirfd, name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = Close(fd) }()
	var st unix.Stat_t
	if err := Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, ErrNotRegular
	}
	buf := make([]byte, min(st.Size, int64(limit))+1)
	for n := 0; ; {
		m, err := Read(fd, buf[n:])
		if err != nil {
			return nil, err
		}
		n += m
		if n > limit {
			return nil, fmt.Errorf("longer than %d bytes", limit)
		}
		if n == len(buf) { // it has grown
			buf = append(buf, make([]byte, len(buf))...)
			continue
		}
		return buf[:n], nil // a regular file gives less than there is room for only at its end
	}
}

// ReadStartAt reads the file name beneath dirfd into buf by one call and returns what it got.
// It is for files whose content the caller checks to the last byte and which fill buf only if
// they are too long: no call is spent on what kind of file it is. A directory is EISDIR, a fifo is empty.
func ReadStartAt(dirfd int, name string, buf []byte) ([]byte, error) {
	fd, err := Openat(dirfd, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = Close(fd) }()
	n, err := Read(fd, buf)
	if err != nil {
		return nil, err
	}
	return buf[:n], nil
}

// WriteFileAt makes the file name beneath dirfd, which must not exist, with exactly
// this mode whatever the umask.
func WriteFileAt(dirfd int, name string, data []byte, mode uint32) (err error) {
	fd, err := Openat(dirfd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, Close(fd)) }()
	if err := unix.Fchmod(fd, mode); err != nil {
		return err
	}
	return WriteFull(fd, data)
}

// MakeEmptyAt makes an empty file, which must not exist, with exactly this mode and time of modification: it has them
// when it appears. It returns the inode's number, or 0 if the time is not set for want of O_TMPFILE or of /proc.
func MakeEmptyAt(dirfd int, name string, mode uint32, mtime unix.Timespec) (ino uint64, err error) {
	fd, err := Openat(dirfd, ".", unix.O_WRONLY|unix.O_TMPFILE, mode)
	switch err {
	case nil:
	case unix.EOPNOTSUPP, unix.EISDIR, unix.ENOENT: // the latter ones from kernels before 3.11
		return 0, WriteFileAt(dirfd, name, nil, mode)
	default:
		return 0, err
	}
	defer func() { _ = Close(fd) }() // empty: nothing can be lost
	var st unix.Stat_t
	if err := Fstat(fd, &st); err != nil {
		return 0, err
	}
	if err := unix.Fchmod(fd, mode); err != nil {
		return 0, err
	}
	if err := Futimens(fd, &[2]unix.Timespec{mtime, mtime}); err != nil {
		return 0, err
	}
	switch err = retry(func() error {
		return unix.Linkat(unix.AT_FDCWD, ProcPath(fd), dirfd, name, unix.AT_SYMLINK_FOLLOW)
	}); err {
	case nil:
		return st.Ino, nil
	case unix.ENOENT:
		return 0, WriteFileAt(dirfd, name, nil, mode)
	}
	return 0, err
}

// Mkdirat makes the directory name beneath dirfd with exactly this mode whatever the umask.
func Mkdirat(dirfd int, name string, mode uint32) error {
	if err := retry(func() error { return unix.Mkdirat(dirfd, name, mode) }); err != nil {
		return err
	}
	return unix.Fchmodat(dirfd, name, mode, 0)
}

// IsDirat returns nil if name beneath dirfd is a directory, and not a symlink to one.
func IsDirat(dirfd int, name string) error {
	var st unix.Stat_t
	if err := Fstatat(dirfd, name, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return unix.ENOTDIR
	}
	return nil
}

// ReadNames calls f with the name of each entry of the open directory fd, in the
// filesystem's order, until f returns false.
func ReadNames(fd int, f func(name string) bool) error {
	var r DirReader
	if err := r.Reset(fd); err != nil {
		return err
	}
	for {
		name, _, err := r.Next()
		if err != nil || name == nil || !f(string(name)) {
			return err
		}
	}
}

// RenameNoReplace renames a directory to a name that must not exist. A filesystem without
// RENAME_NOREPLACE (Linux 3.15, commit 0a7c3937a1f2) gets a plain rename, which refuses all but an empty directory.
func RenameNoReplace(olddir int, oldname string, newdir int, newname string) error {
	err := unix.Renameat2(olddir, oldname, newdir, newname, unix.RENAME_NOREPLACE)
	if err == unix.EINVAL || err == unix.ENOSYS {
		err = unix.Renameat(olddir, oldname, newdir, newname)
	}
	return err
}

// Flock takes (LOCK_SH, LOCK_EX, with or without LOCK_NB) or releases (LOCK_UN) the lock of an open file.
func Flock(fd, how int) error {
	return retry(func() error { return unix.Flock(fd, how) })
}
