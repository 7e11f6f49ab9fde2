package archive

import (
	"errors"
	"fmt"
	"slices"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// root writes the entry of the root if there is something to say, and returns its marks.
func (p *packer) root(fd int) (marks, error) {
	var st sys.Stat
	if err := sys.StatFd(fd, &st); err != nil {
		return marks{}, err
	}
	names, err := p.readXattrs(xattrSource{fd: fd})
	if err != nil {
		return marks{}, err
	}
	m, err := parseMarks(fd, p.opts.Format, names)
	if err != nil {
		return marks{}, err
	}
	if p.picked != nil && p.lowers == nil {
		if !slices.ContainsFunc(p.opts.Changes, func(c Change) bool { return c.Path == "/" && c.Kind != Deleted }) {
			return m, nil
		}
	} else if same, err := p.rootUnchanged(&st); err != nil || same {
		return m, err
	}
	return m, p.write(&st, &packHeader{typ: typeDir})
}

// rootUnchanged says whether the root, with st and p.xattrs, is what it would be without an
// entry for it.
func (p *packer) rootUnchanged(st *sys.Stat) (bool, error) {
	if p.lowers == nil {
		uid, gid, err := p.opts.IDMap.ToContainer(st.UID, st.GID)
		return uid == 0 && gid == 0 && st.Mode&0o7777 == 0o755 && len(p.xattrs) == 0, err
	}
	low := xattrSource{fd: p.lowers.parts[0].fd}
	var lowSt sys.Stat
	if err := sys.StatFd(low.fd, &lowSt); err != nil {
		return false, err
	}
	names, _, err := low.list(make([]byte, 1<<10))
	if err != nil {
		return false, err
	}
	xattrs, _, err := low.content(nil, names, p.attrs)
	if err == nil {
		err = packXattrs(xattrs, p.opts.IDMap)
	}
	return st.Mode == lowSt.Mode && st.UID == lowSt.UID && st.GID == lowSt.GID && slices.Equal(p.xattrs, xattrs), err
}

// readXattrs reads the xattrs that the archive will have into p.xattrs, and returns
// the names of all.
func (p *packer) readXattrs(from xattrSource) (names []byte, err error) {
	if p.xattrBuf == nil {
		p.xattrBuf = make([]byte, 4<<10)
	}
	p.xattrs = p.xattrs[:0]
	names, p.xattrBuf, err = from.list(p.xattrBuf)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	var lost int64
	if p.xattrs, lost, err = from.content(p.xattrs, names, p.attrs); err != nil {
		return nil, err
	}
	p.stats.SkippedXattrs += lost
	return names, packXattrs(p.xattrs, p.opts.IDMap)
}

// write formats the header of the entry at hand: the caller gives what is special of its
// type, the rest comes from st and p.xattrs.
func (p *packer) write(st *sys.Stat, h *packHeader) error {
	uid, gid, err := p.opts.IDMap.ToContainer(st.UID, st.GID)
	if err != nil {
		return err
	}
	h.name, h.mode, h.uid, h.gid = p.entry, st.Mode&0o7777, uid, gid
	h.mtime, h.mtimeNsec = st.Mtime.Sec, st.Mtime.Nsec
	if c := p.opts.Clamp; !c.IsZero() && (h.mtime > c.Unix() || (h.mtime == c.Unix() && h.mtimeNsec > uint32(c.Nanosecond()))) {
		h.mtime, h.mtimeNsec = c.Unix(), uint32(c.Nanosecond())
	}
	h.xattrs = p.xattrs
	return p.put(h)
}

// put formats a header. One that Unpack would refuse is an error, and most of these no reader takes.
func (p *packer) put(h *packHeader) error {
	if n := max(len(h.name), len(h.link)); n > maxName {
		return fmt.Errorf("name of %d bytes, the limit is %d: %w", n, maxName, unix.ENAMETOOLONG)
	}
	if n := len(h.xattrs); n > maxXattrs {
		return fmt.Errorf("%d xattrs, the limit is %d: %w", n, maxXattrs, unix.E2BIG)
	}
	p.out = p.header.append(p.out, h)
	if n := len(p.header.pax); n > maxMeta {
		return fmt.Errorf("extended header of %d bytes, the limit is %d: %w", n, maxMeta, unix.E2BIG)
	}
	p.stats.Entries++
	return nil
}

// dirEntry writes the entry of the directory fd and returns its marks.
func (p *packer) dirEntry(fd int) (marks, error) {
	var st sys.Stat
	if err := sys.StatFd(fd, &st); err != nil {
		return marks{}, err
	}
	names, err := p.readXattrs(xattrSource{fd: fd})
	if err != nil {
		return marks{}, err
	}
	m, err := parseMarks(fd, p.opts.Format, names)
	if err != nil {
		return m, err
	}
	return m, p.write(&st, &packHeader{typ: typeDir})
}

// hardLink writes the entry at hand as a link if its file was written by another name.
// first says that this is the first of several names: keepLink must follow.
func (p *packer) hardLink(st *sys.Stat) (written, first bool, err error) {
	if st.Nlink < 2 {
		return false, false, nil
	}
	id := inode{st.Dev, st.Ino}
	l, known := p.links[id]
	if !known {
		return false, true, nil
	}
	if l.left--; l.left == 0 {
		delete(p.links, id)
	} else {
		p.links[id] = l
	}
	p.xattrs = p.xattrs[:0]
	if l.capability != "" {
		p.xattrs = append(p.xattrs, tarXattr{xattrCapability, l.capability})
	}
	return true, false, p.write(st, &packHeader{typ: typeLink, link: []byte(l.name)})
}

// keepLink notes the entry at hand, of which p.xattrs are those, as the first name of a file with several.
func (p *packer) keepLink(st *sys.Stat) {
	l := link{name: string(p.entry), left: st.Nlink - 1}
	for _, x := range p.xattrs {
		if x.name == xattrCapability {
			l.capability = x.value
		}
	}
	p.links[inode{st.Dev, st.Ino}] = l
}

// node writes an entry that has no content: symlink, device, fifo. A whiteout on disk
// becomes one in the tar.
func (p *packer) node(src source, f *packFrame) error {
	var st sys.Stat
	if err := sys.StatName(src.dirfd, src.name, &st); err != nil {
		return err
	}
	h := packHeader{major: st.Major, minor: st.Minor}
	switch st.Type() {
	case unix.S_IFLNK:
		h = packHeader{typ: typeSymlink}
	case unix.S_IFIFO:
		h = packHeader{typ: typeFifo}
	case unix.S_IFBLK:
		h.typ = typeBlock
	case unix.S_IFCHR:
		h.typ = typeChar
		if st.Major == 0 && st.Minor == 0 {
			if p.opts.Format == Merged || f.view != nil {
				return fmt.Errorf("a device 0:0 would be a mark: %w", ErrInvalidWhiteout)
			}
			return p.whiteout(src.name)
		}
	case unix.S_IFSOCK:
		p.stats.SkippedSockets++
		return nil
	default:
		return ErrChanged
	}
	written, first, err := p.hardLink(&st)
	if written || err != nil {
		return err
	}
	if _, err := p.readXattrs(xattrSource{fd: -1, dirfd: src.dirfd, name: src.name}); err != nil {
		return err
	}
	if h.typ == typeSymlink {
		if p.target, err = sys.ReadlinkName(src.dirfd, src.name, p.target[:0]); err != nil {
			return err
		}
		h.link = p.target
		p.stats.Size += int64(len(p.target))
	}
	if first {
		p.keepLink(&st)
	}
	return p.write(&st, &h)
}

// file begins a regular file.
func (p *packer) file(src source, f *packFrame) error {
	fd, err := p.openSource(src, f)
	if err != nil {
		return replaced(err)
	}
	if err := p.openFile(fd, src, f); err != nil {
		_ = sys.Close(fd)
		return err
	}
	return nil
}

// openSource opens what was a regular file when its directory was listed. A process in a container may have put
// something else there since.
func (p *packer) openSource(src source, f *packFrame) (int, error) {
	if p.noDevices < 0 || f.view != nil {
		return sys.OpenRegular(src.dirfd, src.name)
	}
	fd, err := sys.OpenUnsafe(src.dirfd, src.name)
	if errors.Is(err, unix.EACCES) {
		return sys.OpenRegular(src.dirfd, src.name) // says whether it was a device
	}
	return fd, err
}

// openFile writes the header of the regular file fd, and makes fd the body or closes it.
func (p *packer) openFile(fd int, src source, f *packFrame) error {
	var st sys.Stat
	if err := sys.StatFd(fd, &st); err != nil {
		return err
	}
	if st.Type() != unix.S_IFREG {
		return ErrChanged
	}
	written, first, err := p.hardLink(&st)
	if written && err == nil {
		_ = sys.Close(fd) // read only: nothing can be lost
	}
	if written || err != nil {
		return err
	}
	names, err := p.readXattrs(xattrSource{fd: fd})
	if err != nil {
		return err
	}
	m, err := parseMarks(fd, p.opts.Format, names)
	if err != nil {
		return err
	}
	if f.marks.holdsMarks && m.whiteout && st.Size == 0 && f.view == nil {
		_ = sys.Close(fd)
		return p.whiteout(src.name)
	}
	data := fd
	if m.metacopy {
		if data, err = p.metacopyData(src, f, m); err != nil {
			return err
		}
	}
	if first {
		p.keepLink(&st)
	}
	if err = p.begin(data, &st); err != nil && data != fd {
		_ = sys.Close(data)
	}
	if err == nil && data != fd {
		_ = sys.Close(fd)
	}
	return err
}

// begin writes the header of a file with the metadata st, and makes fd, its content, the body.
func (p *packer) begin(fd int, st *sys.Stat) error {
	h := packHeader{typ: typeReg, size: st.Size}
	b := packBody{fd: fd, left: st.Size}
	var sparseMap []byte
	var fragments []dataFragment
	if !p.opts.NoSparse {
		var err error
		if fragments, err = readFragments(fd, st); err != nil {
			return err
		}
	}
	if fragments != nil {
		if sparseMap, b.left = formatFragments(fragments); sparseMap == nil {
			if err := sys.Seek(fd, 0); err != nil {
				return err
			}
			fragments, b.left = nil, st.Size
		}
	}
	if fragments != nil {
		h.sparse, h.realSize, h.size = true, st.Size, int64(len(sparseMap))+b.left
		b.fragments, b.sparse = fragments, true
	}
	if err := p.write(st, &h); err != nil {
		return err
	}
	p.out = append(p.out, sparseMap...)
	p.stats.Size += st.Size
	b.pad = int(padding(h.size))
	p.body = b
	if b.left == 0 {
		p.body.close()
	}
	return nil
}

// metacopyData opens the content of a file whose metadata alone lies at src.
func (p *packer) metacopyData(src source, f *packFrame, m marks) (int, error) {
	if f.view != nil {
		return f.view.openData(src.name.String())
	}
	if p.lowers == nil {
		return -1, errNeedsLowers("overlay.metacopy")
	}
	low, err := p.low()
	if err != nil {
		return -1, err
	}
	return p.lowers.dataBelow(low, src.name.String(), m)
}
