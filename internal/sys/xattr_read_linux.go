package sys

import "golang.org/x/sys/unix"

// Fgetxattr returns the value of an extended attribute of an open descriptor, not an
// O_PATH one. ENODATA says that there is none.
func Fgetxattr(fd int, attr string) ([]byte, error) {
	return growing(func(buf []byte) (int, error) { return unix.Fgetxattr(fd, attr, buf) })
}

// Getxattrat returns the value of an extended attribute of name beneath dirfd, of a
// symlink itself.
func Getxattrat(dirfd int, name, attr string) ([]byte, error) {
	path := ProcPath(dirfd) + "/" + name
	return growing(func(buf []byte) (int, error) { return unix.Lgetxattr(path, attr, buf) })
}

// growing calls get with larger buffers until the value fits. The kernel's limit is 64 KiB.
func growing(get func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 8 {
		buf := make([]byte, size)
		n, err := get(buf)
		switch {
		case err == nil:
			return buf[:n], nil
		case err == unix.EINTR:
			size /= 8
		case err != unix.ERANGE || size > 64<<10:
			return nil, err
		}
	}
}

// Flistxattr lists the names of the extended attributes of an open descriptor into
// buf, each ended by a NUL, and returns their length. ERANGE says that buf is too small;
// 64 KiB always suffice.
func Flistxattr(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Flistxattr(fd, buf)
		if err != unix.EINTR {
			return n, err
		}
	}
}
