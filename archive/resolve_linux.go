package archive

import (
	"errors"
	"fmt"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

const (
	// maxOpenDirs is how many of the nested directories leading to an entry are kept open.
	maxOpenDirs = 64
	// maxLinks is how many symlinks a name may go through, as in the kernel.
	maxLinks = 40
	// maxSteps bounds the components that symlinks may add to a name in all.
	maxSteps = 8192
)

// dirNode is a directory on the way from the root to the entry at work.
type dirNode struct {
	name   string
	parent *dirNode
	fd     int // -1 while closed
	// made says that this Unpack made the directory: all it holds came from the stream.
	made bool
	// acl says that a default ACL here gives new entries an ACL of their own.
	acl bool
	// ownGroup says that what is made here gets the process's group.
	ownGroup bool
	dev, ino uint64
	// hash stands for the path, see nameSet.
	hash uint64
	// mtime is what the directory must have in the end, if it is dirty.
	mtime unix.Timespec
	dirty bool
	// mode is set on leaving, if lateMode: until then an owner who is not root needs all access.
	mode     uint32
	lateMode bool
	// view is what lower layers have here, nil if nothing merges. See builder.view.
	view      *mergedDir
	viewKnown bool
}

// walkMode says what becomes of directories that a name needs and this layer lacks.
type walkMode uint8

const (
	// walkMake makes them, like the lower layers' if they have them.
	walkMake walkMode = iota
	// walkCopyUp makes those that a lower layer has; else it is ENOENT.
	walkCopyUp
)

// resolver holds the directories from the root to the current entry's parent. Every
// step is one component beneath a handle and follows no symlink: those are expanded here,
// within the root. Whatever another process does to the tree at the same time, a
// handle was reached from the root.
type resolver struct {
	stack []*dirNode
	// firstOpen is the place of the first open node above the root; those between are closed.
	firstOpen int
	// clamped says that the last walk had a ".." at the root.
	clamped bool
}

func (r *resolver) top() *dirNode { return r.stack[len(r.stack)-1] }

// nextComponent cuts the first component off path, without slashes and ".".
func nextComponent(path string) (comp, rest string) {
	for {
		for path != "" && path[0] == '/' {
			path = path[1:]
		}
		comp, rest, _ = strings.Cut(path, "/")
		if comp != "." {
			return comp, rest
		}
		path = rest
	}
}

// splitPath splits a name into the path to its parent and its last component, which is
// empty if the name stands for a directory reached by "." or ".." or is the root.
func splitPath(name string) (dir, base string) {
	end := len(name)
	for end > 0 && name[end-1] == '/' {
		end--
	}
	name = name[:end]
	i := strings.LastIndexByte(name, '/')
	dir, base = name[:i+1], name[i+1:]
	if base == "." || base == ".." {
		return name, ""
	}
	return dir, base
}

// walk makes the directory path the top of the stack. What the path has in common with the
// stack costs no call. Leaving a directory gives it its final times.
func (b *builder) walk(path string, mode walkMode) error {
	depth, rest := 0, path
	for depth+1 < len(b.stack) {
		comp, tail := nextComponent(rest)
		if comp != b.stack[depth+1].name {
			break
		}
		depth++
		rest = tail
	}
	b.clamped = false
	if comp, _ := nextComponent(rest); comp == "" {
		return b.popTo(depth)
	}
	if err := b.popTo(depth); err != nil {
		return err
	}
	links, steps := 0, 0
	for {
		comp, tail := nextComponent(rest)
		rest = tail
		if comp == "" {
			return nil
		}
		if comp == ".." {
			if err := b.up(); err != nil {
				return err
			}
			continue
		}
		target, err := b.down(comp, mode)
		if err != nil {
			return err
		}
		if target == "" {
			continue
		}
		links++
		steps += strings.Count(target, "/") + 1
		if links > maxLinks || steps > maxSteps || len(target)+len(rest) > 2*maxName {
			return fmt.Errorf("too many symlinks: %w", unix.ELOOP)
		}
		if target[0] == '/' {
			if err := b.popTo(0); err != nil {
				return err
			}
		}
		rest = target + "/" + rest
	}
}

// up goes to the parent; at the root it stays, as in a chroot.
func (b *builder) up() error {
	if len(b.stack) == 1 {
		b.clamped = true
		return nil
	}
	return b.popTo(len(b.stack) - 2)
}

// down enters the directory comp, or returns the target of the symlink that it is.
func (b *builder) down(comp string, mode walkMode) (target string, err error) {
	if strings.HasPrefix(comp, whiteoutPrefix) {
		return "", fmt.Errorf("directory %q: %w", comp, ErrInvalidWhiteout)
	}
	top := b.top()
	fd, err := sys.OpenDirat(top.fd, comp)
	switch {
	case err == nil:
		return "", b.push(fd, comp, false)
	case errors.Is(err, unix.ENOENT):
		return b.missing(comp, mode)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return b.notDir(comp, mode)
	case errors.Is(err, unix.EACCES) && b.euid != 0:
		return "", b.forceOpen(comp)
	}
	return "", inDir(comp, err)
}

// inDir adds to an error the component of a longer name that it is about.
func inDir(comp string, err error) error { return fmt.Errorf("directory %q: %w", comp, err) }

// missing stands in for a directory that this layer lacks. Through the mounted tree
// the lower layers' would be there, so a symlink of theirs is followed.
func (b *builder) missing(comp string, mode walkMode) (target string, err error) {
	view, err := b.view(b.top())
	if err != nil {
		return "", err
	}
	if view != nil {
		low, err := view.lookup(comp)
		if err != nil {
			return "", inDir(comp, err)
		}
		switch {
		case !low.exists:
		case low.st.Mode&unix.S_IFMT == unix.S_IFLNK:
			target, err := sys.Readlinkat(low.dirfd, comp)
			return target, err
		case low.st.Mode&unix.S_IFMT == unix.S_IFDIR:
			return "", b.copyUpDir(comp, &low)
		}
	}
	if mode != walkMake {
		return "", inDir(comp, unix.ENOENT)
	}
	return "", b.implicitDir(comp)
}

// notDir handles a component that is in the way: a symlink is followed; a whiteout gives
// way to a directory that hides what it hid. Anything else is an error, as for mkdir.
func (b *builder) notDir(comp string, mode walkMode) (target string, err error) {
	top := b.top()
	var st unix.Stat_t
	if err := sys.Fstatat(top.fd, comp, &st); err != nil {
		return "", inDir(comp, err)
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return sys.Readlinkat(top.fd, comp)
	case isWhiteoutStat(&st) && mode == walkMake && b.opts.Format != Merged:
		b.touch(top)
		if err := sys.Unlinkat(top.fd, comp, 0); err != nil {
			return "", inDir(comp, err)
		}
		if err := b.implicitDir(comp); err != nil {
			return "", err
		}
		return "", b.makeOpaque(b.top())
	case isWhiteoutStat(&st):
		return "", inDir(comp, unix.ENOENT)
	}
	return "", inDir(comp, unix.ENOTDIR)
}

func isWhiteoutStat(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// forceOpen enters a directory that an earlier entry closed to its own owner, who
// unpacks; it gets its mode back on leaving.
func (b *builder) forceOpen(comp string) error {
	top := b.top()
	h, err := sys.Openat(top.fd, comp, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return inDir(comp, err)
	}
	var st unix.Stat_t
	if err = sys.Fstat(h, &st); err == nil {
		err = sys.ChmodPath(h, st.Mode&0o7777|0o700)
	}
	if err = errors.Join(err, sys.Close(h)); err != nil {
		return inDir(comp, err)
	}
	fd, err := sys.OpenDirat(top.fd, comp)
	if err != nil {
		return inDir(comp, err)
	}
	if err := b.push(fd, comp, false); err != nil {
		return err
	}
	n := b.top()
	n.lateMode, n.mode = true, st.Mode&0o7777
	return nil
}

// push puts the open directory fd on the stack, which owns it then, in case of an error
// too. Made says that it was made for the current entry.
func (b *builder) push(fd int, name string, made bool) error {
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return errors.Join(inDir(name, err), sys.Close(fd))
	}
	n := &dirNode{name: name, parent: b.top(), fd: fd}
	b.setNode(n, &st)
	n.hash = b.names.hash(n.parent.hash, name)
	n.made = made || n.parent.made || b.names.has(n.hash, nameMade)
	b.stack = append(b.stack, n)
	if !made {
		n.acl = hasDefaultACL(fd)
		if b.euid != 0 && st.Uid == b.euid && n.mode&0o700 != 0o700 {
			if err := sys.Fchmod(fd, n.mode|0o700); err != nil {
				return inDir(name, err)
			}
			n.lateMode = true
		}
	}
	return b.limitOpen()
}

// setNode takes over what the kernel says of the directory.
func (b *builder) setNode(n *dirNode, st *unix.Stat_t) {
	n.dev, n.ino = st.Dev, st.Ino
	n.mtime, n.mode = st.Mtim, st.Mode&0o7777
	// A filesystem with group semantics of BSD, or a set-group-id directory, gives new
	// entries the directory's group. Where that is ours it makes no difference.
	n.ownGroup = st.Gid == b.egid
}

// limitOpen closes the handles nearest to the root when there are too many.
func (b *builder) limitOpen() error {
	for len(b.stack)-b.firstOpen > maxOpenDirs {
		n := b.stack[b.firstOpen]
		// What merges beneath must be known before it can't be looked up.
		if _, err := b.view(b.stack[b.firstOpen+1]); err != nil {
			return err
		}
		if err := b.leave(n); err != nil {
			return err
		}
		b.firstOpen++
	}
	return nil
}

// popTo leaves the directories above the first depth ones beneath the root.
func (b *builder) popTo(depth int) error {
	if depth > 0 && depth < b.firstOpen {
		if err := b.reopen(depth); err != nil {
			return err
		}
	}
	for len(b.stack)-1 > depth {
		n := b.top()
		b.stack = b.stack[:len(b.stack)-1]
		if n.fd >= 0 {
			if err := b.leave(n); err != nil {
				return err
			}
		}
	}
	if depth == 0 {
		b.firstOpen = 1
	}
	return nil
}

// reopen opens again the closed directory at depth, which will be the top: up from the first
// open one or down from the root, whichever is nearer. It must be the one it was.
func (b *builder) reopen(depth int) error {
	n := b.stack[depth]
	fd, err := -1, error(nil)
	if b.firstOpen-depth < depth {
		fd, err = b.climb(depth)
	} else {
		fd, err = b.openAgain(n)
	}
	if err != nil {
		return inDir(n.name, err)
	}
	n.fd = fd
	b.firstOpen = depth
	return nil
}

// climb reaches the directory at depth by "..".
func (b *builder) climb(depth int) (int, error) {
	fd, owned := b.stack[b.firstOpen].fd, false
	for i := b.firstOpen - 1; i >= depth; i-- {
		up, err := sys.OpenDirat(fd, "..")
		if owned {
			err = errors.Join(err, sys.Close(fd))
		}
		if err != nil {
			return -1, err
		}
		fd, owned = up, true
		if err := b.stack[i].is(fd); err != nil {
			return -1, errors.Join(err, sys.Close(fd))
		}
	}
	return fd, nil
}

// openAgain opens a second handle of a directory on the stack, from the root.
func (b *builder) openAgain(n *dirNode) (int, error) {
	var way []*dirNode
	for ; n.parent != nil; n = n.parent {
		way = append(way, n)
	}
	fd, owned := n.fd, false
	for i := len(way) - 1; i >= 0; i-- {
		next, err := sys.OpenDirat(fd, way[i].name)
		if owned {
			err = errors.Join(err, sys.Close(fd))
		}
		if err != nil {
			return -1, err
		}
		fd, owned = next, true
		if err := way[i].is(fd); err != nil {
			return -1, errors.Join(err, sys.Close(fd))
		}
	}
	return fd, nil
}

// is checks that fd is the directory that n was.
func (n *dirNode) is(fd int) error {
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Dev != n.dev || st.Ino != n.ino {
		return ErrChanged
	}
	return nil
}

// touch notes that the directory's times are about to change.
func (b *builder) touch(n *dirNode) {
	n.dirty = true
	if b.opts.Format == Merged {
		b.keep(n)
	}
}

// leave gives the directory its final times and mode, and closes it.
func (b *builder) leave(n *dirNode) error {
	err := b.settle(n)
	if n.view != nil && n.parent != nil {
		n.view.close()
		n.view, n.viewKnown = nil, false
	}
	err = errors.Join(err, sys.Close(n.fd))
	n.fd = -1
	return err
}

// settle gives the directory its final times and mode.
func (b *builder) settle(n *dirNode) error {
	if n.lateMode {
		n.lateMode = false
		if err := sys.Fchmod(n.fd, n.mode); err != nil {
			return inDir(n.name, err)
		}
	}
	if !n.dirty {
		return nil
	}
	n.dirty = false
	times := [2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, n.mtime}
	if err := sys.Futimens(n.fd, &times); err != nil {
		return inDir(n.name, err)
	}
	return nil
}

// view returns what the lower layers show at the place of a directory on the stack, nil
// if nothing merges there: the layer's own is new, opaque, or replaces something else.
func (b *builder) view(n *dirNode) (*mergedDir, error) {
	var way []*dirNode
	for ; !n.viewKnown; n = n.parent {
		way = append(way, n)
	}
	if len(way) == 0 || n.view == nil {
		for _, n := range way {
			n.viewKnown = true
		}
		return n.view, nil
	}
	return b.viewDown(n, way)
}

// viewDown finds the views of the directories way, the last of which is beneath from. Closed
// ones are opened on the way, and keep nothing open: deep trees would take too many descriptors.
func (b *builder) viewDown(from *dirNode, way []*dirNode) (view *mergedDir, err error) {
	at := cursor{fd: from.fd}
	if at.fd < 0 {
		if at.fd, err = b.openAgain(from); err != nil {
			return nil, inDir(from.name, err)
		}
		at.owned = true
	}
	defer func() { err = errors.Join(err, at.close()) }()
	view, owned := from.view, false
	for i := len(way) - 1; i >= 0; i-- {
		n := way[i]
		if view == nil {
			n.viewKnown = true
			continue
		}
		err := at.enter(n)
		var next *mergedDir
		if err == nil {
			next, err = b.viewOf(view, at.fd, n.name)
		}
		if owned {
			view.close()
		}
		if err != nil {
			return nil, inDir(n.name, err)
		}
		view, owned = next, n.fd < 0 && next != nil
		if !owned {
			n.view, n.viewKnown = next, true
		}
	}
	return view, nil
}

// cursor is a handle on its way down the stack; owned says that it is not a node's.
type cursor struct {
	fd    int
	owned bool
}

// enter goes to n, a child of where it is.
func (c *cursor) enter(n *dirNode) error {
	next := cursor{fd: n.fd}
	if n.fd < 0 {
		fd, err := sys.OpenDirat(c.fd, n.name)
		if err != nil {
			return err
		}
		next = cursor{fd, true}
		if err := n.is(fd); err != nil {
			return errors.Join(err, sys.Close(fd))
		}
	}
	err := c.close()
	*c = next
	return err
}

func (c *cursor) close() error {
	if !c.owned {
		return nil
	}
	c.owned = false
	return sys.Close(c.fd)
}

// viewOf returns what merges beneath this layer's directory fd, which lies by name where view is.
func (b *builder) viewOf(view *mergedDir, fd int, name string) (*mergedDir, error) {
	m, err := readMarks(fd, b.opts.Format)
	if err != nil {
		return nil, err
	}
	return view.below(m, name)
}
