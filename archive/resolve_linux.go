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
