package archive

import (
	"errors"
	"fmt"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// copyBuffer is how much of a file is copied at a time where the kernel can't do it.
const copyBuffer = 256 << 10

// lowerXattrs returns those xattrs of an open file of a lower layer that belong to its content.
func lowerXattrs(fd int) ([]xattr, error) {
	list, err := listXattrs(fd)
	if err != nil {
		return nil, err
	}
	var xattrs []xattr
	for attr := range strings.SplitSeq(string(list), "\x00") {
		if !copiedXattr(attr) {
			continue
		}
		value, err := sys.Fgetxattr(fd, attr)
		if err != nil {
			return nil, fmt.Errorf("xattr %s: %w", attr, err)
		}
		xattrs = append(xattrs, xattr{attr, string(value)})
	}
	return xattrs, nil
}

// copyUp makes what the lower layers have by name in the place of dir.
func (b *builder) copyUp(dir *dirNode, name string) error {
	view, err := b.view(dir)
	if err != nil {
		return err
	}
	var low lowerEntry
	if view != nil {
		if low, err = view.lookup(name); err != nil {
			return err
		}
	}
	if !low.exists {
		if b.names.has(b.names.hash(dir.hash, name), nameSkipped) {
			return errSkipped
		}
		return unix.ENOENT
	}
	b.touch(dir)
	m := meta{mode: low.st.Mode & 0o7777, uid: low.st.Uid, gid: low.st.Gid, dropACL: dir.acl}
	times := [2]unix.Timespec{low.st.Atim, low.st.Mtim}
	switch kind := low.st.Mode & unix.S_IFMT; kind {
	case unix.S_IFREG:
		return b.copyUpFile(view, dir, name, &m, &low, &times)
	case unix.S_IFLNK:
		target, err := sys.Readlinkat(low.dirfd, name)
		if err != nil {
			return err
		}
		if err := sys.Symlinkat(target, dir.fd, name); err != nil {
			return err
		}
		b.size.Add(int64(len(target)))
		return b.setNamed(dir, name, kind, &m, &times)
	case unix.S_IFDIR:
		return fmt.Errorf("a directory: %w", unix.EPERM)
	default:
		if err := sys.Mknodat(dir.fd, name, kind|m.mode&0o777, low.st.Rdev); err != nil {
			return err
		}
		return b.setNamed(dir, name, kind, &m, &times)
	}
}

// copyUpFile copies a regular file. Its metadata may be in another layer than its data.
func (b *builder) copyUpFile(view *mergedDir, dir *dirNode, name string, m *meta, low *lowerEntry, times *[2]unix.Timespec) (err error) {
	src, err := view.openData(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sys.Close(src)) }()
	from, err := sys.Openat(low.dirfd, name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	m.xattrs, err = lowerXattrs(from)
	if err = errors.Join(err, sys.Close(from)); err != nil {
		return err
	}
	dst, err := sys.Openat(dir.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, m.mode&0o777)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sys.Close(dst)) }()
	if err := copyFile(dst, src, low.st.Size, b.goOn); err != nil {
		return err
	}
	b.size.Add(low.st.Size)
	var st unix.Stat_t
	if err := sys.Fstat(dst, &st); err != nil {
		return err
	}
	if err := m.setOpen(dst, &st); err != nil {
		return err
	}
	return sys.Futimens(dst, times)
}

// copyFile copies size bytes, holes as holes, and ends with the error of stop.
func copyFile(dst, src int, size int64, stop func() error) error {
	buf := make([]byte, min(copyBuffer, size))
	for pos := int64(0); pos < size; {
		data, err := unix.Seek(src, pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole
		}
		if err != nil {
			data = pos // no holes on this filesystem
		}
		end, err := unix.Seek(src, data, unix.SEEK_HOLE)
		if err != nil {
			end = size
		}
		for end = min(end, size); data < end; {
			if err := stop(); err != nil {
				return err
			}
			n, err := sys.Pread(src, buf[:min(int64(len(buf)), end-data)], data)
			if err != nil {
				return err
			}
			if n == 0 {
				return ErrChanged
			}
			if err := sys.PwriteFull(dst, buf[:n], data); err != nil {
				return err
			}
			data += int64(n)
		}
		pos = max(end, data)
	}
	return sys.Ftruncate(dst, size)
}
