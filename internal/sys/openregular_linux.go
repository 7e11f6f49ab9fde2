package sys

import "golang.org/x/sys/unix"

// readQuietly are the flags to open a file for reading. O_NONBLOCK and O_NOCTTY are for what is no regular file.
const readQuietly = unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY

// OpenRegular opens name beneath dirfd for reading if it is a regular file, else it is ErrNotRegular. Whoever may
// change the directory meanwhile cannot have it open anything else: to open a device calls its driver, and to open
// a fifo wakes who waits at its other end. The access time is left alone where that is allowed.
func OpenRegular(dirfd int, name Name) (int, error) {
	node, err := OpenName(dirfd, name, unix.O_PATH)
	if err != nil {
		return -1, err
	}
	defer func() { _ = Close(node) }() // O_PATH: nothing can be lost
	var st Stat
	if err := StatFd(node, &st); err != nil {
		return -1, err
	}
	if st.Type() != unix.S_IFREG {
		return -1, ErrNotRegular
	}
	fd, err := openPath(ProcPath(node), readQuietly|unix.O_NOATIME)
	switch err {
	case unix.EPERM:
		return openPath(ProcPath(node), readQuietly)
	case unix.ENOENT: // no /proc: what is left is to be quick
		return OpenUnsafe(dirfd, name)
	}
	return fd, err
}

// OpenUnsafe opens name beneath dirfd for reading, whatever it is: for directories that
// nobody else changes, or of CloneNoDevices. A symlink is ELOOP.
func OpenUnsafe(dirfd int, name Name) (int, error) { return OpenQuiet(dirfd, name, readQuietly) }

func openPath(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_LARGEFILE, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}
