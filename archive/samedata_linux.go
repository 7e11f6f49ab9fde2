package archive

import (
	"bytes"
	"errors"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// sameData compares the first size bytes of two files, which both had a moment ago. What is a hole in both is
// not read: a tar of some KiB can make files of many TiB.
func (c *comparer) sameData(x, y int, size int64) (bool, error) {
	if c.dataA == nil {
		c.dataA, c.dataB = make([]byte, 256<<10), make([]byte, 256<<10)
	}
	a, b := dataRange{fd: x}, dataRange{fd: y}
	if size <= int64(len(c.dataA)) {
		a.end, b.end = size, size // one read, whatever there is
	}
	for at := int64(0); at < size; {
		if c.stop != nil {
			if err := c.stop(); err != nil {
				return false, err
			}
		}
		if err := errors.Join(a.find(at, size), b.find(at, size)); err != nil {
			return false, err
		}
		// To the end of the data that comes first: a hole beside it must be zeros.
		next := a
		if b.start < a.start {
			next = b
		}
		at = max(at, next.start)
		want := int(min(next.end-at, int64(len(c.dataA))))
		n, err := preadFull(x, c.dataA[:want], at)
		if err != nil {
			return false, err
		}
		m, err := preadFull(y, c.dataB[:want], at)
		if err != nil {
			return false, err
		}
		if n != m || !bytes.Equal(c.dataA[:n], c.dataB[:m]) {
			return false, nil
		}
		if n < want {
			return true, nil // both have become shorter
		}
		at += int64(n)
	}
	return true, nil
}

// dataRange is a piece of a file with holes on both sides.
type dataRange struct {
	fd         int
	start, end int64
}

// find goes on to the first data at or behind at; without any to size, where the range is empty. A
// filesystem that knows no holes has data everywhere.
func (d *dataRange) find(at, size int64) error {
	if at < d.end {
		return nil
	}
	start, err := unix.Seek(d.fd, at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		d.start, d.end = size, size
		return nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		d.start, d.end = at, size
		return nil
	case err != nil:
		return err
	}
	end, err := unix.Seek(d.fd, start, unix.SEEK_HOLE)
	if err != nil {
		end = size // the hole came or the file shrank meanwhile: reading tells
	}
	d.start, d.end = min(start, size), min(end, size)
	return nil
}

// preadFull reads at offset until buf is full or the file ends.
func preadFull(fd int, buf []byte, offset int64) (int, error) {
	n := 0
	for n < len(buf) {
		m, err := sys.Pread(fd, buf[n:], offset+int64(n))
		if err != nil {
			return n, err
		}
		if m == 0 {
			break
		}
		n += m
	}
	return n, nil
}
