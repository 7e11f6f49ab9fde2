package archive

import (
	"bytes"
	"context"
	"errors"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// Compare returns how the tree at newDir differs from that at oldDir, sorted by path:
// two mounted or plain directories, given by trusted host paths. With an empty oldDir all of
// newDir is Added.
//
// A directory with anything changed beneath it is Modified, one that is gone is listed
// alone. What differs is as Changes has it. Files that are the same inode of the same layer, seen
// through two overlays, are not read; others of which all the metadata is equal are. A file that was made and
// last changed within one tick of the kernel's clock is read, too: it may have been copied up within that tick.
//
// Errors are *EntryError with the path of the file.
func Compare(ctx context.Context, newDir, oldDir string) ([]Change, error) {
	return CompareSince(ctx, newDir, oldDir, time.Time{})
}

// CompareSince is Compare of two mounted layers for a caller who knows since when they may differ: since is the time
// of birth (statx) of the first made of those upper directories that only one of them has. Files that
// were not changed since then are not read. The zero time is Compare.
func CompareSince(ctx context.Context, newDir, oldDir string, since time.Time) ([]Change, error) {
	c := comparison{ctx: ctx, files: comparer{mounted: true, since: since, stop: ctx.Err}}
	c.new.walk.stop, c.old.walk.stop = ctx.Err, ctx.Err
	defer c.new.walk.close()
	defer c.old.walk.close()
	if err := c.run(newDir, oldDir); err != nil {
		return nil, &EntryError{Op: "compare", Name: string(c.list.path) + "/" + c.name.String(), Err: err}
	}
	c.list.changes = withTorn(c.list.changes, c.links.torn())
	return c.list.sorted(), nil
}

// comparison is one run of Compare: a walk of two trees side by side.
type comparison struct {
	ctx      context.Context
	new, old tree
	levels   []level
	list     changeList
	files    comparer
	links    linkGroups
	// name is the entry at hand, for an error.
	name sys.Name
}

type tree struct {
	walk  walk
	attrs xattrNames
}

// level is a pair of directories that the comparison is in.
type level struct {
	// start is the length of the path above.
	start int
	// mark is the length of the list behind the entry of the directory itself, which goes again if
	// nothing follows it and the directory itself did not change.
	mark    int
	changed bool
}

func (c *comparison) run(newDir, oldDir string) error {
	if err := c.new.open(newDir); err != nil {
		return err
	}
	if err := c.old.open(oldDir); err != nil {
		return err
	}
	c.levels = append(c.levels, level{changed: true})
	for len(c.levels) > 0 {
		if err := c.step(); err != nil {
			return err
		}
	}
	return nil
}

// open begins the walk of a tree; an empty path is an empty tree.
func (t *tree) open(dir string) error {
	if dir == "" {
		_, err := t.walk.enter(-1)
		return err
	}
	fd, err := sys.OpenRoot(dir)
	if err != nil {
		return err
	}
	if err := t.walk.push(fd, true); err != nil {
		return err
	}
	var info unix.Statfs_t
	err = unix.Fstatfs(fd, &info)
	t.attrs.raw = info.Type == unix.OVERLAYFS_SUPER_MAGIC
	return err
}

// step compares the next name of the two directories at hand, or goes up.
func (c *comparison) step() error {
	c.name = nil
	if err := c.ctx.Err(); err != nil {
		return err
	}
	x, y := c.new.walk.top(), c.old.walk.top()
	if err := c.new.walk.more(x); err != nil {
		return err
	}
	if err := c.old.walk.more(y); err != nil {
		return err
	}
	a, b := x.peek(), y.peek()
	order := bytes.Compare(a, b)
	switch {
	case a == nil && b == nil:
		return c.leave()
	case b == nil || (a != nil && order < 0):
		name, typ := x.take()
		c.name = name
		c.list.add(name, Added)
		return c.added(x.fd, name, typ)
	case a == nil || order > 0:
		name, _ := y.take()
		c.list.add(name, Deleted)
		return nil
	}
	name, _ := x.take()
	_, _ = y.take()
	c.name = name
	return c.both(x.fd, y.fd, name)
}

// added goes down into a directory that the old tree hasn't.
func (c *comparison) added(dirfd int, name sys.Name, typ uint8) error {
	if typ != unix.DT_DIR {
		var st sys.Stat
		if err := sys.StatName(dirfd, name, &st); err != nil {
			return err
		}
		if st.Type() != unix.S_IFDIR {
			c.links.note(&st, "", true)
			return nil
		}
	}
	return c.enter(name, dirfd, -1, true)
}

// both compares what the two trees have by one name.
func (c *comparison) both(newFd, oldFd int, name sys.Name) error {
	a := fileAt{dirfd: newFd, name: name, attrs: c.new.attrs, open: func() (int, error) { return openRegular(newFd, name) }}
	b := fileAt{dirfd: oldFd, name: name, attrs: c.old.attrs, open: func() (int, error) { return openRegular(oldFd, name) }}
	if err := sys.StatName(newFd, name, &a.st); err != nil {
		return err
	}
	if err := sys.StatName(oldFd, name, &b.st); err != nil {
		return err
	}
	same, err := c.files.same(&a, &b)
	if err != nil {
		return err
	}
	if a.st.Nlink > 1 {
		c.links.note(&a.st, c.list.pathOf(name), !same)
	}
	isDir, wasDir := a.st.Type() == unix.S_IFDIR, b.st.Type() == unix.S_IFDIR
	if !same || isDir {
		c.list.add(name, Modified)
	}
	switch {
	case isDir && wasDir:
		return c.enter(name, newFd, oldFd, !same)
	case isDir:
		return c.enter(name, newFd, -1, true)
	}
	return nil
}

// enter goes down into the directory name of both trees, or of the new one alone if
// oldFd is -1. It is the last of the list, to stay there only if it changed or something beneath.
func (c *comparison) enter(name sys.Name, newFd, oldFd int, changed bool) error {
	if err := c.new.enter(newFd, name); err != nil {
		return err
	}
	if err := c.old.enter(oldFd, name); err != nil {
		return err
	}
	start := len(c.list.path)
	c.list.path = append(append(c.list.path, '/'), name[:len(name)-1]...)
	c.levels = append(c.levels, level{start: start, mark: len(c.list.changes), changed: changed})
	if oldFd < 0 {
		c.list.expect(c.new.walk.top().total)
	}
	return nil
}

func (t *tree) enter(dirfd int, name sys.Name) error {
	if dirfd < 0 {
		_, err := t.walk.enter(-1)
		return err
	}
	fd, err := sys.OpenQuiet(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return replaced(err)
	}
	return t.walk.push(fd, true)
}

func (c *comparison) leave() error {
	l := c.levels[len(c.levels)-1]
	c.levels = c.levels[:len(c.levels)-1]
	if !l.changed && len(c.list.changes) == l.mark {
		c.list.changes = c.list.changes[:l.mark-1]
	}
	err := errors.Join(c.new.walk.pop(), c.old.walk.pop())
	c.list.path = c.list.path[:l.start]
	return err
}
