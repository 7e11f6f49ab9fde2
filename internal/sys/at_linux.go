package sys

import (
	"io"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// retry calls f until it does something else than being interrupted by a signal.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

// Openat opens name beneath dirfd. O_CLOEXEC and O_NOFOLLOW are added: a symlink is
// never followed here, so that name, one component, cannot lead elsewhere.
func Openat(dirfd int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(dirfd, name, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, mode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// OpenDirat opens the directory name beneath dirfd for reading. A symlink is ENOTDIR or ELOOP.
func OpenDirat(dirfd int, name string) (int, error) {
	return Openat(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
}

// OpenRoot opens a directory by a host path, which is trusted; only its last
// component must not be a symlink.
func OpenRoot(path string) (int, error) {
	return Openat(unix.AT_FDCWD, path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
}

// Close closes fd. EINTR is not retried: Linux has closed the descriptor by then.
func Close(fd int) error {
	if err := unix.Close(fd); err != nil && err != unix.EINTR {
		return err
	}
	return nil
}

// Fstatat returns the metadata of name beneath dirfd, of a symlink itself. An empty
// name means dirfd.
func Fstatat(dirfd int, name string, st *unix.Stat_t) error {
	flags := unix.AT_SYMLINK_NOFOLLOW
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	return retry(func() error { return unix.Fstatat(dirfd, name, st, flags) })
}

// Fstat returns the metadata of an open descriptor.
func Fstat(fd int, st *unix.Stat_t) error {
	return retry(func() error { return unix.Fstat(fd, st) })
}

// Readlinkat returns the target of the symlink name beneath dirfd, however long.
func Readlinkat(dirfd int, name string) (string, error) {
	for size := 128; ; size *= 4 {
		buf := make([]byte, size)
		n, err := unix.Readlinkat(dirfd, name, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return "", err
		}
		if n < size {
			return string(buf[:n]), nil
		}
	}
}

// Read fills buf once, at most; 0 and nil is the end of the file.
func Read(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Read(fd, buf)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// WriteFull writes all of buf.
func WriteFull(fd int, buf []byte) error {
	for len(buf) > 0 {
		n, err := unix.Write(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		buf = buf[n:]
	}
	return nil
}

// ProcFDs is the directory in which the number of each open descriptor is a name, with a slash.
const ProcFDs = "/proc/self/fd/"

// ProcPath names an open descriptor, O_PATH too, for the calls that take only a path.
// It names the file itself, a symlink too: nothing is followed beyond it.
func ProcPath(fd int) string { return ProcFDs + strconv.Itoa(fd) }

// OpenBeneath opens, as O_PATH, a directory by a path of some components beneath dirfd,
// none of them a symlink. Kernels before openat2 (5.6, commit fddb5d430ad9) walk one by one.
func OpenBeneath(dirfd int, path string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	for {
		fd, err := unix.Openat2(dirfd, path, &how)
		switch err {
		case unix.EINTR, unix.EAGAIN: // EAGAIN: a rename somewhere raced with RESOLVE_BENEATH
			continue
		case unix.ENOSYS, unix.EPERM: // EPERM: seccomp filters that don't know the call
			return walkBeneath(dirfd, path)
		}
		return fd, err
	}
}

// walkBeneath is OpenBeneath by one openat a component.
func walkBeneath(dirfd int, path string) (int, error) {
	fd := -1
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || name == "." || name == ".." {
			return -1, unix.EINVAL
		}
		next, err := Openat(dirfd, name, unix.O_PATH|unix.O_DIRECTORY, 0)
		if fd >= 0 {
			_ = Close(fd)
		}
		if err != nil {
			return -1, err
		}
		fd, dirfd = next, next
	}
	return fd, nil
}
