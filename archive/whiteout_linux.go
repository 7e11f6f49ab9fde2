package archive

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// Names of marks in a tar, as aufs had them and the OCI image specification keeps them
// (layer.md, Whiteouts). Those that begin with aufsPrefix and are not opaqueName were aufs's
// own files, and are no content.
const (
	aufsPrefix = ".wh..wh."
	plnkDir    = ".wh..wh.plnk"
	// plnkPatience is how long their removal may take after a failure.
	plnkPatience = 20 * time.Millisecond
)

// mark obeys a mark: base, which begins with ".wh.", in the directory dir.
func (b *builder) mark(e *tarEntry, dir, base string) error {
	hidden := strings.TrimPrefix(base, whiteoutPrefix)
	if hidden == "" || hidden == "." || hidden == ".." || e.kind == typeDir {
		return ErrInvalidWhiteout
	}
	if base != opaqueName && strings.HasPrefix(base, aufsPrefix) {
		return nil
	}
	mode := walkMake
	if b.opts.Format == Merged {
		mode = walkCopyUp // nothing is made only to be empty
	}
	err := b.walk(dir, mode)
	if mode == walkCopyUp && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR)) {
		return nil
	}
	if err != nil {
		return err
	}
	switch {
	case b.opts.Format == Merged && base == opaqueName:
		return b.sweepKept()
	case b.opts.Format == Merged:
		return b.hideMerged(hidden)
	case base == opaqueName:
		return b.makeOpaque(b.top())
	}
	return b.hide(hidden)
}

// hide makes sure that nothing of the lower layers shows by name in the current directory.
// What this layer has there is gone as well, save for a directory: that stays with
// what the stream put into it, which is the same in either order.
func (b *builder) hide(name string) error {
	top := b.top()
	var st unix.Stat_t
	err := sys.Fstatat(top.fd, name, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
	case err != nil:
		return err
	case isWhiteoutStat(&st):
		return nil
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return b.hideBelowDir(name)
	default:
		b.touch(top)
		b.sizeSure = false
		if err := sys.Unlinkat(top.fd, name, 0); err != nil {
			return err
		}
	}
	view, err := b.view(top)
	if err != nil || view == nil {
		return err
	}
	b.touch(top)
	return makeWhiteout(top.fd, name)
}

// makeWhiteout makes a character device 0:0. Its time is fixed: a whiteout has none in a tar.
func makeWhiteout(dirfd int, name string) error {
	if err := sys.Mknodat(dirfd, name, unix.S_IFCHR, 0); err != nil {
		return err
	}
	return sys.Lutimesat(dirfd, name, &[2]unix.Timespec{})
}

// hideBelowDir makes a directory of this layer opaque. If it was only made for what
// it holds, it looks like a new one then and not like the one that is gone.
func (b *builder) hideBelowDir(name string) error {
	view, err := b.view(b.top())
	if err != nil || view == nil {
		return err
	}
	if err := b.enter(name, false); err != nil {
		return err
	}
	n := b.top()
	if err := b.makeOpaque(n); err != nil {
		return err
	}
	if !b.names.has(n.hash, nameImplicit) {
		return nil
	}
	b.names.remove(n.hash, nameImplicit)
	uid, gid, err := b.opts.IDMap.Root()
	if err != nil {
		return err
	}
	return b.setDirMeta(n, &meta{mode: 0o755, uid: uid, gid: gid}, false)
}

// makeOpaque lets nothing of the lower layers show through n, the current directory.
// Whiteouts beneath go away: where nothing merges, overlayfs lists them as names that
// cannot be read.
func (b *builder) makeOpaque(n *dirNode) error {
	view, err := b.view(n)
	if err != nil || view == nil {
		return err
	}
	if err := setOpaque(n.fd, b.opts.Format); err != nil {
		return err
	}
	if n.parent == nil {
		// overlayfs ignores the mark on the root of an upper layer: see hideRoot.
		b.rootOpaque = true
		n.view = nil
		return nil
	}
	b.dropView(n)
	n.viewKnown = true
	return b.sweepWhiteouts()
}

func setOpaque(fd int, f Format) error {
	attr := f.xattrPrefix() + "opaque"
	if err := sys.Fsetxattr(fd, attr, []byte("y")); err != nil {
		return fmt.Errorf("xattr %s: %w", attr, err)
	}
	return nil
}

// hideRoot hides by whiteouts and opaque directories what the lower layers' roots hold.
func (b *builder) hideRoot() error {
	if err := b.awaitLowers(); err != nil {
		return err
	}
	names, err := b.lowers.names()
	if err != nil {
		return err
	}
	root := b.stack[0]
	for _, name := range names {
		if err := b.goOn(); err != nil {
			return err
		}
		var st unix.Stat_t
		err := sys.Fstatat(root.fd, name, &st)
		switch {
		case errors.Is(err, unix.ENOENT):
			b.touch(root)
			err = makeWhiteout(root.fd, name)
		case err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR:
			err = b.hideRootDir(name)
		}
		if err != nil {
			return inDir(name, err)
		}
	}
	return nil
}

func (b *builder) hideRootDir(name string) error {
	if err := b.enter(name, false); err != nil {
		return err
	}
	n := b.top()
	view, err := b.viewOf(b.lowers, n.fd, name)
	if err != nil {
		return err
	}
	if view != nil {
		view.close()
		if err := setOpaque(n.fd, b.opts.Format); err != nil {
			return err
		}
		if err := b.sweepWhiteouts(); err != nil {
			return err
		}
	}
	return b.popTo(0)
}

// sweepWhiteouts removes all whiteouts beneath the current directory.
func (b *builder) sweepWhiteouts() error {
	return b.sweep(func(n *dirNode, name string, typ uint8) (descend bool, err error) {
		switch typ {
		case unix.DT_CHR, unix.DT_DIR, unix.DT_UNKNOWN:
		default:
			return false, nil
		}
		var st unix.Stat_t
		if err := sys.Fstatat(n.fd, name, &st); err != nil {
			return false, err
		}
		if isWhiteoutStat(&st) {
			b.touch(n)
			return false, sys.Unlinkat(n.fd, name, 0)
		}
		return st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
	})
}

// sweepKept removes, with Merged, all beneath the current directory that the stream has not made.
func (b *builder) sweepKept() error {
	return b.sweep(func(n *dirNode, name string, _ uint8) (descend bool, err error) {
		if n.made || name == b.plnkName {
			return false, nil
		}
		hash := b.names.hash(n.hash, name)
		if !b.names.has(hash, nameKept) {
			b.touch(n)
			return false, b.removeAll(n.fd, name)
		}
		if b.names.has(hash, nameMade) {
			return false, nil
		}
		var st unix.Stat_t
		if err := sys.Fstatat(n.fd, name, &st); err != nil {
			return false, err
		}
		return st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
	})
}

// hideMerged removes name from the tree, but not what the stream has put into it.
func (b *builder) hideMerged(name string) error {
	top := b.top()
	var st unix.Stat_t
	if err := sys.Fstatat(top.fd, name, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	hash := b.names.hash(top.hash, name)
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR, !top.made && !b.names.has(hash, nameKept):
		b.touch(top)
		return b.removeAll(top.fd, name)
	case top.made, b.names.has(hash, nameMade):
		return nil
	}
	if err := b.enter(name, false); err != nil {
		return err
	}
	return b.sweepKept()
}

// sweep visits all entries beneath the current directory, and enters those directories of
// which visit says so. It ends where it began.
func (b *builder) sweep(visit func(n *dirNode, name string, typ uint8) (descend bool, err error)) error {
	depth := len(b.stack) - 1
	var todo [][]string // for each directory from there on, the ones in it not visited yet
	list := func() error {
		n := b.top()
		var dirs []string
		err := b.list(n, func(name string, typ uint8) error {
			descend, err := visit(n, name, typ)
			if descend {
				dirs = append(dirs, name)
			}
			return err
		})
		todo = append(todo, dirs)
		return err
	}
	if err := list(); err != nil {
		return err
	}
	for {
		last := len(todo) - 1
		if len(todo[last]) == 0 {
			if last == 0 {
				return nil
			}
			todo = todo[:last]
			if err := b.popTo(depth + last - 1); err != nil {
				return err
			}
			continue
		}
		name := todo[last][0]
		todo[last] = todo[last][1:]
		if err := b.enter(name, false); err != nil {
			return err
		}
		if err := list(); err != nil {
			return err
		}
	}
}

// list calls each with the entries of an open directory.
func (b *builder) list(n *dirNode, each func(name string, typ uint8) error) error {
	if err := b.dents.Reset(n.fd); err != nil {
		return err
	}
	for {
		if err := b.goOn(); err != nil {
			return err
		}
		name, typ, err := b.dents.Next()
		if err != nil || name == nil {
			return err
		}
		if err := each(string(name), typ); err != nil {
			return err
		}
	}
}

// aufs handles aufs's own files in the root, which old images hold: hard links may
// go through its directory of pseudo links, all else is no content.
func (b *builder) aufs(e *tarEntry, seq int64, first, rest string) (*outFile, error) {
	name, more := nextComponent(rest)
	if first != plnkDir || name == "" || more != "" || (e.kind != typeReg && e.kind != typeLink) {
		return nil, nil
	}
	if err := b.makePlnk(); err != nil {
		return nil, err
	}
	b.sizeSure = false // what no name links to is gone in the end
	if e.kind == typeLink {
		return nil, b.linkTo(e, func() (*dirNode, string, error) { return b.plnk, name, nil })
	}
	return b.put(b.plnk, name, e, seq)
}

// makePlnk makes a directory for pseudo links, by a name that no tar can know.
func (b *builder) makePlnk() error {
	if b.plnk != nil {
		return nil
	}
	root := b.stack[0]
	b.touch(root)
	name := ".plnk-" + rand.Text()
	if err := sys.Mkdirat(root.fd, name, 0o700); err != nil {
		return err
	}
	b.plnkName = name
	fd, err := sys.OpenDirat(root.fd, name)
	if err != nil {
		return err
	}
	b.plnk = &dirNode{name: name, parent: root, fd: fd, made: true, acl: root.acl}
	return nil
}

// dropPlnk removes the directory for pseudo links. Files with other names stay.
func (b *builder) dropPlnk() error {
	if b.plnkName == "" {
		return nil
	}
	root := b.stack[0]
	b.touch(root)
	// After a failure there may be a caller who waits, and the layer is of no use.
	deadline := time.Now().Add(plnkPatience)
	err := sys.RemoveAllUntil(root.fd, b.plnkName, func() error {
		if err := b.goOn(); err != nil && time.Now().After(deadline) {
			return err
		}
		return nil
	})
	if b.plnk != nil {
		err = errors.Join(err, sys.Close(b.plnk.fd))
	}
	return err
}
