package sys

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Offsets in struct linux_dirent64 (include/linux/dirent.h): u64 ino, s64 off, u16
// reclen, u8 type, then the name and a NUL.
const (
	direntReclen = 16
	direntType   = 18
	direntName   = 19
)

// DirReader lists an open directory in the kernel's order and without "." and "..".
// The buffer is kept between directories, so that a walk allocates nothing for it.
type DirReader struct {
	fd       int
	pos, end int
	buf      []byte
}

// Start makes the reader list fd, which was not listed before.
func (d *DirReader) Start(fd int) {
	if d.buf == nil {
		d.buf = make([]byte, 32<<10)
	}
	d.fd, d.pos, d.end = fd, 0, 0
}

// Reset makes the reader list fd from the start, also when it was listed before.
func (d *DirReader) Reset(fd int) error {
	d.Start(fd)
	_, err := unix.Seek(fd, 0, unix.SEEK_SET)
	return err
}

// Next returns the next entry: its name, valid until the next call and followed by a
// NUL in memory, and its type, unix.DT_UNKNOWN where the filesystem does not say. A nil name is the end.
func (d *DirReader) Next() (name []byte, typ uint8, err error) {
	for {
		if d.pos >= d.end {
			n, err := getdents(d.fd, d.buf)
			if err != nil || n == 0 {
				return nil, 0, err
			}
			d.pos, d.end = 0, n
		}
		rec := d.buf[d.pos:d.end]
		length := int(binary.NativeEndian.Uint16(rec[direntReclen:]))
		if length <= direntName || length > len(rec) {
			return nil, 0, unix.EIO
		}
		rec = rec[:length]
		d.pos += length
		end := bytes.IndexByte(rec[direntName:], 0)
		if end < 0 {
			return nil, 0, unix.EIO
		}
		name = rec[direntName : direntName+end]
		if len(name) == 0 || (name[0] == '.' && (len(name) == 1 || (len(name) == 2 && name[1] == '.'))) {
			continue
		}
		return name, rec[direntType], nil
	}
}

func getdents(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Getdents(fd, buf)
		if err != unix.EINTR {
			return n, err
		}
	}
}
