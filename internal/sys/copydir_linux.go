package sys

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// CopyDirMetadata gives the open directory dst the mode, owner and extended attributes
// of src. What belongs to the one directory rather than to what it shows is left out:
// overlayfs's private attributes, and the SELinux label, which policy gives. It returns the identities of both.
func CopyDirMetadata(dst, src int) (to, from Ident, err error) {
	want, err := StatDir(src, "")
	if err != nil {
		return to, from, err
	}
	have, err := StatDir(dst, "")
	if err != nil {
		return to, from, err
	}
	return have.Ident, want.Ident, copyMetadata(dst, src, have, want)
}

func copyMetadata(dst, src int, have, want DirInfo) error {
	if want.UID != have.UID || want.GID != have.GID {
		if err := unix.Fchown(dst, int(want.UID), int(want.GID)); err != nil {
			return fmt.Errorf("chown: %w", err)
		}
	}
	if err := copyXattrs(dst, src); err != nil {
		return err
	}
	if want.Mode != have.Mode { // after chown, which clears setuid bits
		if err := unix.Fchmod(dst, want.Mode&0o7777); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	return nil
}

// copyXattrs gives dst the xattrs of src, and takes others away, but for those that are the
// kernel's affair.
func copyXattrs(dst, src int) error {
	has, err := xattrsToCopy(dst)
	if err != nil {
		return err
	}
	want, err := xattrsToCopy(src)
	if err != nil {
		return err
	}
	for _, name := range has {
		if slices.Contains(want, name) {
			continue
		}
		if err := unix.Fremovexattr(dst, name); err != nil && err != unix.ENODATA {
			return fmt.Errorf("xattr %s: %w", name, err)
		}
	}
	for _, name := range want {
		value, err := Fgetxattr(src, name)
		if err == unix.ENODATA {
			continue
		}
		if err == nil {
			err = unix.Fsetxattr(dst, name, value, 0)
		}
		if err != nil {
			return fmt.Errorf("xattr %s: %w", name, err)
		}
	}
	return nil
}

// xattrsToCopy lists the xattrs of a directory that are not overlayfs's private ones or the label.
func xattrsToCopy(fd int) ([]string, error) {
	list, err := growing(func(buf []byte) (int, error) { return Flistxattr(fd, buf) })
	if err == unix.EOPNOTSUPP || len(list) == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listxattr: %w", err)
	}
	names := strings.Split(strings.TrimSuffix(string(list), "\x00"), "\x00")
	return slices.DeleteFunc(names, func(name string) bool {
		return strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") || name == "security.selinux"
	}), nil
}
