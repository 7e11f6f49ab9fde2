package archive

import (
	"bytes"
	"slices"
	"strings"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// fileAt is one of two files that are compared.
type fileAt struct {
	dirfd int
	name  sys.Name
	st    sys.Stat
	attrs xattrNames
	// open opens the content for reading.
	open func() (int, error)
}

// comparer compares files. It keeps its buffers.
type comparer struct {
	// mounted: the files may be the same inode shown by two overlays, each with a device
	// number of its own.
	mounted bool
	// since, unless it is zero, is a time before which nothing was copied up that the files may be.
	since time.Time
	// stop says whether the work is to stop, by an error; nil is never.
	stop func() error

	listA, listB []byte
	dataA, dataB []byte
	textA, textB []byte
}

// same says whether two files show no difference: type, permissions, owner, time, xattrs
// and, for what is no directory, size, device number, target, content. What of these is
// cheap comes first.
func (c *comparer) same(a, b *fileAt) (bool, error) {
	x, y := &a.st, &b.st
	if x.Mode != y.Mode || x.UID != y.UID || x.GID != y.GID || x.Mtime != y.Mtime {
		return false, nil
	}
	isDir := x.Type() == unix.S_IFDIR
	// Another number of links is another group of hard links: a diff without the file could not restore it.
	if !isDir && (x.Size != y.Size || x.Nlink != y.Nlink) {
		return false, nil
	}
	if t := x.Type(); (t == unix.S_IFCHR || t == unix.S_IFBLK) && (x.Major != y.Major || x.Minor != y.Minor) {
		return false, nil
	}
	if !isDir && x.Ino == y.Ino && x.Ctime == y.Ctime {
		if x.Dev == y.Dev {
			return true, nil
		}
		if one, err := c.oneInode(a, b); one || err != nil {
			return one, err
		}
	}
	if same, err := c.sameXattrs(a, b); err != nil || !same || isDir {
		return same, err
	}
	switch x.Type() {
	case unix.S_IFLNK:
		return c.sameTarget(a, b)
	case unix.S_IFREG:
		return c.sameContent(a, b)
	}
	return true, nil
}

// oneInode says whether two files that two overlays show with the same inode number and time of change
// surely are one. A copy in an upper layer keeps the number, and the kernel's clock for times has a grain of up
// to 10 ms (1/HZ): what is made, copied up and changed within one tick has the same times. The copy's time of
// birth is that of copying up, and so no other than the file's own only if both fall into the tick of the last change.
func (c *comparer) oneInode(a, b *fileAt) (bool, error) {
	if !c.mounted {
		return false, nil
	}
	if changed := time.Unix(a.st.Ctime.Sec, int64(a.st.Ctime.Nsec)); changed.Before(c.since) {
		return true, nil
	}
	x, known, err := sys.Birth(a.dirfd, a.name)
	if err != nil {
		return false, err
	}
	y, knownToo, err := sys.Birth(b.dirfd, b.name)
	if err != nil {
		return false, err
	}
	if !known || !knownToo {
		return a.st.Mtime != a.st.Ctime, nil // writing sets both
	}
	return x == y && x != a.st.Ctime, nil
}

func (c *comparer) sameXattrs(a, b *fileAt) (bool, error) {
	if c.listA == nil {
		c.listA, c.listB = make([]byte, 1<<10), make([]byte, 1<<10)
	}
	var namesA, namesB []byte
	var err error
	from, to := a.xattrs(), b.xattrs()
	if namesA, c.listA, err = from.list(c.listA); err != nil {
		return false, err
	}
	if namesB, c.listB, err = to.list(c.listB); err != nil {
		return false, err
	}
	if len(namesA)+len(namesB) == 0 {
		return true, nil
	}
	x, _, err := from.content(nil, namesA, a.attrs)
	if err != nil {
		return false, err
	}
	y, _, err := to.content(nil, namesB, b.attrs)
	return slices.Equal(x, y), err
}

func (f *fileAt) xattrs() xattrSource { return xattrSource{fd: -1, dirfd: f.dirfd, name: f.name} }

func (c *comparer) sameTarget(a, b *fileAt) (bool, error) {
	var err error
	if c.textA, err = sys.ReadlinkName(a.dirfd, a.name, c.textA[:0]); err != nil {
		return false, err
	}
	if c.textB, err = sys.ReadlinkName(b.dirfd, b.name, c.textB[:0]); err != nil {
		return false, err
	}
	return bytes.Equal(c.textA, c.textB), nil
}

func (c *comparer) sameContent(a, b *fileAt) (bool, error) {
	if a.st.Size == 0 {
		return true, nil
	}
	x, err := a.open()
	if err != nil {
		return false, replaced(err)
	}
	defer func() { _ = sys.Close(x) }() // read only: nothing can be lost
	y, err := b.open()
	if err != nil {
		return false, replaced(err)
	}
	defer func() { _ = sys.Close(y) }()
	var one, other sys.Stat
	if err := sys.StatFd(x, &one); err != nil {
		return false, err
	}
	if err := sys.StatFd(y, &other); err != nil {
		return false, err
	}
	if one.Dev == other.Dev && one.Ino == other.Ino {
		return true, nil // data that two metacopies share
	}
	if one.Size != other.Size {
		return false, nil
	}
	return c.sameData(x, y, one.Size)
}

// openRegular opens a regular file by its name; it was one a moment ago.
func openRegular(dirfd int, name sys.Name) (int, error) {
	fd, err := sys.OpenRegular(dirfd, name)
	if err != nil {
		return -1, replaced(err)
	}
	return fd, nil
}

// changeList collects changes in the order of a walk.
type changeList struct {
	changes []Change
	// path names the directory at hand, without a trailing slash; empty for the root.
	path []byte
	// text holds the paths of the list, many in a piece of memory.
	text strings.Builder
}

func (l *changeList) add(name sys.Name, kind Kind) {
	l.changes = append(l.changes, Change{Path: l.pathOf(name), Kind: kind})
}

// expect makes room for n changes: a list that grows step by step is twice in memory at each step.
func (l *changeList) expect(n int) { l.changes = slices.Grow(l.changes, n) }

// pathOf returns the path of a name in the directory at hand.
func (l *changeList) pathOf(name sys.Name) string {
	name = name[:len(name)-1]
	size := len(l.path) + 1 + len(name)
	if l.text.Cap()-l.text.Len() < size {
		l.text = strings.Builder{}
		l.text.Grow(max(size, 32<<10))
	}
	start := l.text.Len()
	l.text.Write(l.path)
	l.text.WriteByte('/')
	l.text.Write(name)
	return l.text.String()[start:]
}

// sorted returns the changes sorted by path. A walk's order differs from that only where a name
// goes on with a byte before the slash.
func (l *changeList) sorted() []Change {
	byPath := func(a, b Change) int { return strings.Compare(a.Path, b.Path) }
	if !slices.IsSortedFunc(l.changes, byPath) {
		slices.SortFunc(l.changes, byPath)
	}
	return l.changes
}
