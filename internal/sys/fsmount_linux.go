package sys

import (
	"bytes"
	"errors"
	"strings"

	"golang.org/x/sys/unix"
)

// MaxFsconfigString is the longest string in bytes that one fsconfig(2) takes (256 with
// the NUL; fs/fsopen.c, strndup_user).
const MaxFsconfigString = 255

// FSContext is a filesystem that is being set up by fsopen(2) and fsconfig(2) (5.2,
// commit 24dcb3d90a1f). The first error stays, and later calls do nothing, so that a caller looks once.
type FSContext struct {
	fd  int
	err error
}

// OpenFS starts to set up a filesystem of the type. Close it.
func OpenFS(fstype string) (*FSContext, error) {
	fd, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, &MountError{Call: "fsopen", Target: fstype, Err: err}
	}
	return &FSContext{fd: fd}, nil
}

// Close drops the context; a mount made from it stays.
func (c *FSContext) Close() error { return Close(c.fd) }

// Set gives key a value, of at most MaxFsconfigString bytes.
func (c *FSContext) Set(key, value string) {
	c.do(key, value, func() error { return unix.FsconfigSetString(c.fd, key, value) })
}

// Flag sets key, which has no value.
func (c *FSContext) Flag(key string) {
	c.do(key, "", func() error { return unix.FsconfigSetFlag(c.fd, key) })
}

// SetFD gives key an open file as its value (overlay's directories: 6.13, commit a08557d19ef4).
func (c *FSContext) SetFD(key string, fd int) {
	c.do(key, ProcPath(fd), func() error { return unix.FsconfigSetFd(c.fd, key, fd) })
}

func (c *FSContext) do(key, value string, f func() error) {
	if c.err == nil {
		if err := retry(f); err != nil {
			c.err = &MountError{Call: "fsconfig", Target: key, Data: value, Err: err, Text: c.log()}
		}
	}
}

// Err returns the first error so far and forgets it.
func (c *FSContext) Err() error {
	err := c.err
	c.err = nil
	return err
}

// Mount makes the filesystem and returns a descriptor of its mount, which is in no mount
// table. attrs are MOUNT_ATTR_*.
func (c *FSContext) Mount(attrs int) (int, error) {
	c.do("create", "", func() error { return unix.FsconfigCreate(c.fd) })
	if err := c.Err(); err != nil {
		return -1, err
	}
	fd, err := unix.Fsmount(c.fd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return -1, &MountError{Call: "fsmount", Target: "overlay", Err: err, Text: c.log()}
	}
	return fd, nil
}

// log returns what the kernel has to say: each read of the context gives one message, a
// letter for its weight and a blank before it, until there are no more.
func (c *FSContext) log() string {
	var messages []string
	buf := make([]byte, 1024)
	for range 16 {
		n, err := Read(c.fd, buf)
		if err != nil || n <= 0 {
			break
		}
		message := bytes.TrimRight(buf[:n], "\n")
		if len(message) > 2 && message[1] == ' ' {
			message = message[2:]
		}
		messages = append(messages, string(message))
	}
	return strings.Join(messages, "; ")
}

// MoveMount attaches a mount that a descriptor holds at target. A symlink there is not followed.
func MoveMount(fd int, target string) error {
	err := retry(func() error {
		return unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
	})
	if err != nil {
		return &MountError{Call: "move_mount", Target: target, Err: err}
	}
	return nil
}

// CannotMount reports whether an error is that of a kernel, or of a filter of system calls,
// that lacks a call or what was asked of it.
func CannotMount(err error) bool {
	return errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)
}
