package sys

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// CopyDirMetadata gives the open directory dst the mode, owner and extended attributes
// of src. What belongs to the one directory rather than to what it shows is left out:
// overlayfs's private attributes, and the SELinux label, which policy gives.
func CopyDirMetadata(dst, src int) error {
	var want, have unix.Stat_t
	if err := Fstat(src, &want); err != nil {
		return err
	}
	if err := Fstat(dst, &have); err != nil {
		return err
	}
	if want.Uid != have.Uid || want.Gid != have.Gid {
		if err := unix.Fchown(dst, int(want.Uid), int(want.Gid)); err != nil {
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

func copyXattrs(dst, src int) error {
	names, err := growing(func(buf []byte) (int, error) { return Flistxattr(src, buf) })
	if err == unix.EOPNOTSUPP || len(names) == 0 && err == nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listxattr: %w", err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") || name == "security.selinux" {
			continue
		}
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
