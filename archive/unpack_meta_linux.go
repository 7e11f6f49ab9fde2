package archive

import (
	"errors"
	"fmt"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// setIDBits are taken away by the kernel when the owner changes.
const setIDBits = unix.S_ISUID | unix.S_ISGID

// unknownMode is none that a file can have.
const unknownMode = ^uint32(0)

// meta is metadata as it is to be on disk.
type meta struct {
	mode, uid, gid uint32
	xattrs         []xattr
	// dropACL says that the directory has a default ACL, which nothing may inherit.
	dropACL bool
}

// metaOf translates an entry's metadata for what it makes in dir.
func (u *unpacker) metaOf(e *tarEntry, dir *dirNode) (m meta, err error) {
	m = meta{mode: e.mode, dropACL: dir.acl}
	if m.uid, m.gid, err = u.opts.IDMap.ToHost(e.uid, e.gid); err != nil {
		return m, err
	}
	for _, x := range e.xattrs {
		if machineXattr(x.name) {
			u.skippedXattrs.Add(1)
			continue
		}
		if x.value, err = u.opts.IDMap.mapXattr(x.name, x.value); err != nil {
			return m, fmt.Errorf("xattr %s: %w", x.name, err)
		}
		x.name = u.xattrName(x.name)
		m.xattrs = append(m.xattrs, x)
	}
	return m, nil
}

// setOpen gives an open file or directory, which has the metadata st, that of m: the
// owner first, because changing it drops set-id bits and capabilities; then the mode, then xattrs.
func (m *meta) setOpen(fd int, st *unix.Stat_t) error {
	mode := st.Mode & 0o7777
	if m.dropACL {
		if err := dropACLs(func(attr string) error { return sys.Fremovexattr(fd, attr) }); err != nil {
			return err
		}
		mode = unknownMode // removing an ACL may have changed it
	}
	if st.Uid != m.uid || st.Gid != m.gid {
		if err := sys.Fchown(fd, m.uid, m.gid); err != nil {
			return fmt.Errorf("chown to %d:%d: %w", m.uid, m.gid, err)
		}
		if mode&setIDBits != 0 {
			mode = unknownMode
		}
	}
	// An owner other than root must be able to write to set user.*.
	early := m.mode
	if len(m.xattrs) > 0 {
		early |= 0o600
	}
	if mode != early {
		if err := sys.Fchmod(fd, early); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	err := m.setXattrs(func(attr string, value []byte) error { return sys.Fsetxattr(fd, attr, value) })
	if err == nil && early != m.mode {
		if err = sys.Fchmod(fd, m.mode); err != nil {
			err = fmt.Errorf("chmod: %w", err)
		}
	}
	return err
}

// setNamed gives what was just made by name in a directory the metadata m: a symlink,
// device or fifo, none of which is opened or followed. Kind is its type as in st_mode.
func (u *unpacker) setNamed(dir *dirNode, name string, kind uint32, m *meta, times *[2]unix.Timespec) error {
	switch {
	case kind != unix.S_IFLNK || m.dropACL || len(m.xattrs) > 0:
		if err := m.setHandle(dir.fd, name, kind); err != nil {
			return err
		}
	case m.uid != u.euid || m.gid != u.egid || !dir.ownGroup:
		if err := sys.Lchownat(dir.fd, name, m.uid, m.gid); err != nil {
			return fmt.Errorf("chown to %d:%d: %w", m.uid, m.gid, err)
		}
	}
	return sys.Lutimesat(dir.fd, name, times)
}

// setHandle sets owner, mode and xattrs through an O_PATH handle.
func (m *meta) setHandle(dirfd int, name string, kind uint32) (err error) {
	h, err := sys.OpenPathat(dirfd, name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sys.Close(h)) }()
	var st unix.Stat_t
	if err := sys.Fstat(h, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != kind {
		return ErrChanged // another process put something else there
	}
	symlink := kind == unix.S_IFLNK
	if m.dropACL && !symlink {
		if err := dropACLs(func(attr string) error { return sys.RemovexattrPath(h, attr) }); err != nil {
			return err
		}
	}
	if st.Uid != m.uid || st.Gid != m.gid {
		if err := sys.FchownPath(h, m.uid, m.gid); err != nil {
			return fmt.Errorf("chown to %d:%d: %w", m.uid, m.gid, err)
		}
	}
	if !symlink && (st.Mode&0o7777 != m.mode || m.dropACL || m.mode&setIDBits != 0) {
		if err := sys.ChmodPath(h, m.mode); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	return m.setXattrs(func(attr string, value []byte) error { return sys.SetxattrPath(h, attr, value) })
}

func (m *meta) setXattrs(set func(attr string, value []byte) error) error {
	for _, x := range m.xattrs {
		if err := set(x.name, []byte(x.value)); err != nil {
			return fmt.Errorf("xattr %s: %w", x.name, err)
		}
	}
	return nil
}

// fileType returns the entry's type as in st_mode.
func (e *tarEntry) fileType() uint32 {
	switch e.kind {
	case typeSymlink:
		return unix.S_IFLNK
	case typeChar:
		return unix.S_IFCHR
	case typeBlock:
		return unix.S_IFBLK
	case typeFifo:
		return unix.S_IFIFO
	case typeDir:
		return unix.S_IFDIR
	}
	return unix.S_IFREG
}

// dropACLs removes what a default ACL of the directory gave a new entry.
func dropACLs(remove func(attr string) error) error {
	for _, attr := range []string{xattrACL, xattrDefaultACL} {
		if err := remove(attr); err != nil && !noXattr(err) && !errors.Is(err, unix.EACCES) {
			return fmt.Errorf("%s: %w", attr, err)
		}
	}
	return nil
}

// xattrName returns the name on disk. A mounted overlay escapes its own by itself.
func (u *unpacker) xattrName(name string) string {
	if u.onOverlay {
		return name
	}
	return escapeXattr(name)
}

// removeOtherXattrs removes from a directory that was there the xattrs that its entry does not have.
func (m *meta) removeOtherXattrs(fd int) error {
	list, err := listXattrs(fd)
	if err != nil {
		return err
	}
	wanted := make(map[string]bool, len(m.xattrs))
	for _, x := range m.xattrs {
		wanted[x.name] = true
	}
	for attr := range strings.SplitSeq(string(list), "\x00") {
		if wanted[attr] || !copiedXattr(attr) {
			continue
		}
		if err := sys.Fremovexattr(fd, attr); err != nil && !noXattr(err) {
			return fmt.Errorf("xattr %s: %w", attr, err)
		}
	}
	return nil
}

// machineXattr says that an xattr belongs to a machine and not to the content: the
// label, and the names by which xfs shows its ACLs a second time.
func machineXattr(attr string) bool {
	switch attr {
	case xattrSELinux, "trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT":
		return true
	}
	return false
}

// copiedXattr says that an xattr on disk belongs to the content of a layer: not one of
// overlayfs's own, nor what filesystems put under "system.".
func copiedXattr(attr string) bool {
	switch {
	case attr == "", machineXattr(attr), isPrivate(attr):
		return false
	case strings.HasPrefix(attr, "system."):
		return attr == xattrACL || attr == xattrDefaultACL
	}
	return true
}

// hasDefaultACL says whether new entries of an open directory get an ACL.
func hasDefaultACL(fd int) bool {
	n, err := sys.FgetxattrSize(fd, xattrDefaultACL)
	return err == nil && n > 0
}
