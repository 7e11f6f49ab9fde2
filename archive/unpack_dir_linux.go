package archive

import (
	"encoding/binary"
	"errors"
	"hash/maphash"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// directory makes the directory base in the current one and enters it. One that is there
// keeps what it holds.
func (b *builder) directory(base string, e *tarEntry) error {
	top := b.top()
	b.touch(top)
	made, hiding := true, false
	for try := 0; ; try++ {
		err := sys.MkdiratMasked(top.fd, base, e.mode&0o777|0o700)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EEXIST) || try == maxTries {
			return err
		}
		var st unix.Stat_t
		if err := sys.Fstatat(top.fd, base, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			made = false
			break
		}
		hiding = hiding || (isWhiteoutStat(&st) && b.opts.Format != Merged)
		if err := b.clear(top, base); err != nil {
			return err
		}
	}
	if err := b.enter(base, made); err != nil {
		return err
	}
	n := b.top()
	if err := b.setDir(n, e, made); err != nil {
		return err
	}
	if hiding {
		return b.makeOpaque(n)
	}
	return nil
}

// enter puts the directory base, which is there, on the stack.
func (b *builder) enter(base string, made bool) error {
	fd, err := sys.OpenDirat(b.top().fd, base)
	if errors.Is(err, unix.EACCES) && b.euid != 0 {
		return b.forceOpen(base)
	}
	if err != nil {
		return err
	}
	return b.push(fd, base, made)
}

// setDir gives a directory on the stack the metadata of its entry.
func (b *builder) setDir(n *dirNode, e *tarEntry, made bool) error {
	in := n
	if n.parent != nil {
		in = n.parent
	} else {
		b.root = true
	}
	m, err := b.metaOf(e, in)
	if err != nil {
		return err
	}
	m.dropACL = m.dropACL && made
	if err := b.setDirMeta(n, &m, made); err != nil {
		return err
	}
	times := e.times()
	n.mtime, n.dirty = times[1], true
	b.names.remove(n.hash, nameImplicit)
	if b.opts.Format == Merged {
		b.keep(n)
		if made && !in.made {
			b.names.add(n.hash, nameMade|nameKept) // keep stops at what was made
		}
	}
	if e.hasAtime {
		return sys.Futimens(n.fd, &times)
	}
	return nil
}

// setDirMeta sets owner, mode and xattrs of a directory on the stack. One that was there
// loses the xattrs that it is not to have.
func (b *builder) setDirMeta(n *dirNode, m *meta, made bool) error {
	if !made {
		if err := m.removeOtherXattrs(n.fd); err != nil {
			return err
		}
	}
	now := *m
	if b.euid != 0 && m.mode&0o700 != 0o700 {
		// Its owner has entries to make in it yet.
		now.mode |= 0o700
	}
	var st unix.Stat_t
	if err := sys.Fstat(n.fd, &st); err != nil {
		return err
	}
	if err := now.setOpen(n.fd, &st); err != nil {
		return err
	}
	n.mode, n.lateMode = m.mode, now.mode != m.mode
	n.ownGroup = m.gid == b.egid
	n.acl = false
	for _, x := range m.xattrs {
		n.acl = n.acl || x.name == xattrDefaultACL
	}
	return nil
}

// implicitDir makes and enters a directory that has no entry and no model in a lower layer.
func (b *builder) implicitDir(base string) error {
	uid, gid, err := b.opts.IDMap.Root()
	if err != nil {
		return err
	}
	return b.makeDir(base, &meta{mode: 0o755, uid: uid, gid: gid, dropACL: b.top().acl})
}

// makeDir makes and enters a directory.
func (b *builder) makeDir(base string, m *meta) error {
	top := b.top()
	b.touch(top)
	if err := sys.MkdiratMasked(top.fd, base, m.mode&0o777|0o700); err != nil {
		return inDir(base, err)
	}
	if err := b.enter(base, true); err != nil {
		return inDir(base, err)
	}
	n := b.top()
	if b.opts.Format == Merged && !top.made {
		b.names.add(n.hash, nameMade|nameKept)
	}
	n.dirty = true
	if err := b.setDirMeta(n, m, true); err != nil {
		return inDir(base, err)
	}
	return nil
}

// copyUpDir makes and enters a directory like the one that a lower layer has, as
// overlayfs does when something in it changes.
func (b *builder) copyUpDir(base string, low *lowerEntry) error {
	fd, err := sys.OpenDirat(low.dirfd, base)
	if err != nil {
		return inDir(base, err)
	}
	xattrs, err := lowerXattrs(fd)
	if err = errors.Join(err, sys.Close(fd)); err != nil {
		return inDir(base, err)
	}
	m := meta{mode: low.st.Mode & 0o7777, uid: low.st.Uid, gid: low.st.Gid, xattrs: xattrs, dropACL: b.top().acl}
	if err := b.makeDir(base, &m); err != nil {
		return err
	}
	n := b.top()
	n.mtime, n.dirty = low.st.Mtim, true
	b.names.add(n.hash, nameImplicit)
	return nil
}

// keep notes that the directory, and so all on the way to it, holds something of the stream.
func (b *builder) keep(n *dirNode) {
	for ; n.parent != nil && !n.made && !b.names.has(n.hash, nameKept); n = n.parent {
		b.names.add(n.hash, nameKept)
	}
}

// nameKind says what is known about a path; a set of bits.
type nameKind uint8

const (
	// nameKept: with Merged, the stream has made this or something beneath it.
	nameKept nameKind = 1 << iota
	// nameMade: with Merged, the stream has made this directory, and so all it holds.
	nameMade
	// nameImplicit: a directory made like a lower one, without an entry of its own.
	nameImplicit
	// nameSkipped: a device that a user namespace could not make.
	nameSkipped
)

// nameSet remembers paths by 64-bit hashes with a secret seed: 16 bytes each whatever
// the length, and nobody can make two collide.
type nameSet struct {
	seed  maphash.Seed
	known map[uint64]nameKind
}

func newNameSet() nameSet {
	return nameSet{seed: maphash.MakeSeed(), known: make(map[uint64]nameKind)}
}

// hash returns the hash of name in the directory whose path has the hash dir.
func (s *nameSet) hash(dir uint64, name string) uint64 {
	var h maphash.Hash
	h.SetSeed(s.seed)
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], dir)
	_, _ = h.Write(b[:]) // never fails
	_, _ = h.WriteString(name)
	return h.Sum64()
}

func (s *nameSet) add(hash uint64, kind nameKind) { s.known[hash] |= kind }

func (s *nameSet) has(hash uint64, kind nameKind) bool { return s.known[hash]&kind != 0 }

func (s *nameSet) remove(hash uint64, kind nameKind) {
	if k, ok := s.known[hash]; ok {
		s.known[hash] = k &^ kind
	}
}
