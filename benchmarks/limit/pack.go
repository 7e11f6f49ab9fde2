//go:build linux

package limit

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// node is a name in a directory with the type that getdents gave.
type node struct {
	name string
	kind byte
}

// names reads a whole directory and sorts it.
func names(fd int, buf []byte) ([]node, error) {
	var list []node
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil || n == 0 {
			slices.SortFunc(list, func(a, b node) int { return strings.Compare(a.name, b.name) })
			return list, err
		}
		for p := buf[:n]; len(p) > 0; {
			// struct linux_dirent64: inode 8, offset 8, length 2, type 1, name.
			size := int(p[16]) | int(p[17])<<8
			if name := text(p[19:size]); name != "." && name != ".." {
				list = append(list, node{name, p[18]})
			}
			p = p[size:]
		}
	}
}

func openDir(dirfd int, name string) (int, error) {
	return unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

type inode struct{ dev, ino uint64 }

// packer writes headers and bodies into one buffer.
type packer struct {
	w     io.Writer
	buf   []byte
	n     int
	dents []byte
	links map[inode]string
}

// Pack writes a directory as a tar, whiteouts as ".wh." files. Xattrs are not looked at,
// times are whole seconds.
func Pack(dir string, w io.Writer) error {
	fd, err := openDir(unix.AT_FDCWD, dir)
	if err != nil {
		return err
	}
	p := &packer{w: w, buf: make([]byte, chunkSize), dents: make([]byte, 64<<10), links: map[inode]string{}}
	err = p.dir(fd, "")
	if err == nil {
		err = p.room(2 * block)
	}
	if err == nil {
		clear(p.buf[p.n : p.n+2*block])
		p.n += 2 * block
		err = p.flush()
	}
	return errors.Join(err, unix.Close(fd))
}

func (p *packer) flush() error {
	_, err := p.w.Write(p.buf[:p.n])
	p.n = 0
	return err
}

// room makes n bytes of the buffer free.
func (p *packer) room(n int) error {
	if len(p.buf)-p.n < n {
		return p.flush()
	}
	return nil
}

func (p *packer) dir(fd int, prefix string) error {
	list, err := names(fd, p.dents)
	if err != nil {
		return err
	}
	for _, n := range list {
		if err := p.node(fd, prefix+n.name, n); err != nil {
			return fmt.Errorf("%s%s: %w", prefix, n.name, err)
		}
	}
	return nil
}

func (p *packer) node(dirfd int, name string, n node) error {
	var st unix.Stat_t
	switch n.kind {
	case unix.DT_REG, unix.DT_DIR:
		fd, err := unix.Openat(dirfd, n.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err = unix.Fstat(fd, &st); err == nil {
			if n.kind == unix.DT_DIR {
				if err = p.header(name+"/", "", '5', &st, 0); err == nil {
					err = p.dir(fd, name+"/")
				}
			} else {
				err = p.regular(fd, name, &st)
			}
		}
		return errors.Join(err, unix.Close(fd))
	}
	if err := unix.Fstatat(dirfd, n.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	switch n.kind {
	case unix.DT_LNK:
		target := make([]byte, st.Size+1)
		size, err := unix.Readlinkat(dirfd, n.name, target)
		if err != nil {
			return err
		}
		return p.header(name, string(target[:size]), '2', &st, 0)
	case unix.DT_CHR:
		if st.Rdev == 0 {
			return p.header(strings.TrimSuffix(name, n.name)+".wh."+n.name, "", '0', &st, 0)
		}
		return p.header(name, "", '3', &st, 0)
	case unix.DT_BLK:
		return p.header(name, "", '4', &st, 0)
	case unix.DT_FIFO:
		return p.header(name, "", '6', &st, 0)
	}
	return errors.ErrUnsupported
}

func (p *packer) regular(fd int, name string, st *unix.Stat_t) error {
	if st.Nlink > 1 {
		key := inode{uint64(st.Dev), st.Ino}
		if first, ok := p.links[key]; ok {
			return p.header(name, first, '1', st, 0)
		}
		p.links[key] = name
	}
	if err := p.header(name, "", '0', st, st.Size); err != nil {
		return err
	}
	for left := st.Size; left > 0; {
		if p.n == len(p.buf) {
			if err := p.flush(); err != nil {
				return err
			}
		}
		n, err := unix.Read(fd, p.buf[p.n:min(len(p.buf), p.n+int(left))])
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		p.n += n
		left -= int64(n)
	}
	pad := int(padding(st.Size))
	if err := p.room(pad); err != nil {
		return err
	}
	clear(p.buf[p.n : p.n+pad])
	p.n += pad
	return nil
}

// header writes a USTAR header, with a GNU long name before it where one is needed.
func (p *packer) header(name, link string, kind byte, st *unix.Stat_t, size int64) error {
	if len(name) > 100 {
		if err := p.long('L', name); err != nil {
			return err
		}
		name = name[:100]
	}
	if len(link) > 100 {
		if err := p.long('K', link); err != nil {
			return err
		}
		link = link[:100]
	}
	if err := p.room(block); err != nil {
		return err
	}
	h := p.buf[p.n : p.n+block]
	p.n += block
	clear(h)
	copy(h, name)
	octal(h[100:107], int64(st.Mode&0o7777))
	octal(h[108:115], int64(st.Uid))
	octal(h[116:123], int64(st.Gid))
	octal(h[124:135], size)
	octal(h[136:147], max(0, int64(st.Mtim.Sec)))
	h[156] = kind
	copy(h[157:257], link)
	copy(h[257:], "ustar\x0000")
	if kind == '3' || kind == '4' {
		octal(h[329:336], int64(unix.Major(uint64(st.Rdev))))
		octal(h[337:344], int64(unix.Minor(uint64(st.Rdev))))
	}
	sum := int64(8 * ' ')
	for _, b := range h {
		sum += int64(b)
	}
	octal(h[148:154], sum)
	h[155] = ' '
	return nil
}

func octal(field []byte, n int64) {
	for i := len(field) - 1; i >= 0; i-- {
		field[i] = '0' + byte(n&7)
		n >>= 3
	}
}

func (p *packer) long(kind byte, name string) error {
	size := int64(len(name) + 1)
	if err := p.header("././@LongLink", "", kind, &unix.Stat_t{}, size); err != nil {
		return err
	}
	room := int(size + padding(size))
	if err := p.room(room); err != nil {
		return err
	}
	clear(p.buf[p.n : p.n+room])
	copy(p.buf[p.n:], name)
	p.n += room
	return nil
}
