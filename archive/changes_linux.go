package archive

import (
	"context"
	"errors"
	"fmt"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// Changes returns how the layer in dir, an upper directory, differs from the layers below it,
// sorted by path, without mounting anything: only dir is walked, and each name looked up in the
// lowers. dir and opts.Lowers are trusted host paths.
//
// A path is Added, with all beneath it, if the lowers don't show it; Deleted, without what was
// beneath it, if they do and the layer hides it; and Modified if mode, owner, xattrs, time or,
// for what is no directory, type, device, size, target or content differ, or if something beneath
// a directory changed. A file that was copied up but is the same as below is no change. The root is
// not listed. A directory that replaces a file, or the reverse, is Modified.
//
// It is what Compare finds between mounts of the layer and of its parent.
//
// Errors are *EntryError with the path of the file.
func Changes(ctx context.Context, dir string, opts ReadOptions) ([]Change, error) {
	c := layerChanges{ctx: ctx, format: opts.Format, walk: walk{stop: ctx.Err}, files: comparer{stop: ctx.Err}}
	defer c.close()
	if err := c.run(dir, opts.Lowers); err != nil {
		return nil, &EntryError{Op: "changes", Name: string(c.list.path) + "/" + c.name.String(), Err: err}
	}
	c.list.changes = withTorn(c.list.changes, c.links.torn())
	return c.list.sorted(), nil
}

// layerChanges is one run of Changes.
type layerChanges struct {
	ctx    context.Context
	format Format
	lowers *mergedDir // the root of the view of the lowers
	walk   walk
	frames []changeFrame
	list   changeList
	files  comparer
	links  linkGroups
	// now is what the layer has by the name at hand.
	now fileAt
	// name is the entry at hand, for an error.
	name sys.Name
}

// changeFrame is a directory that the walk is in.
type changeFrame struct {
	level
	marks marks
	// base is what the parent shows at this path; nil if no directory: then all here is Added.
	base *mergedDir
	// parked: base is closed, as those far up are, and opened again on the way back.
	parked bool
	// merged: base also merges with the directory; it is neither opaque nor renamed.
	merged bool
	// view, if set, is where names are looked up: a renamed directory shows more than the layer has.
	view *mergedDir
}

func (c *layerChanges) close() {
	for i := range c.frames {
		c.frames[i].close()
	}
	c.walk.close()
	c.lowers.close()
}

// low is what merges beneath the directory.
func (f *changeFrame) low() *mergedDir {
	if f.merged {
		return f.base
	}
	return nil
}

func (f *changeFrame) close() {
	f.view.close()
	f.base.close()
}

func (c *layerChanges) run(dir string, lowers []string) error {
	if c.format == Merged {
		return fmt.Errorf("a merged tree doesn't say what changed: %w", errors.ErrUnsupported)
	}
	var err error
	if c.lowers, err = openLowers(lowers, c.format); err != nil {
		return err
	}
	fd, err := sys.OpenRoot(dir)
	if err != nil {
		return err
	}
	m, err := readMarks(fd, c.format)
	if err != nil {
		_ = sys.Close(fd)
		return err
	}
	// The root merges with the lowers' whatever its marks say. It shares their handles.
	root := &mergedDir{chain: c.lowers.chain, parts: c.lowers.parts}
	if err := c.walk.push(fd, true); err != nil {
		return err
	}
	c.frames = append(c.frames, changeFrame{level: level{changed: true}, marks: m, base: root, merged: true})
	c.lowers = &mergedDir{chain: c.lowers.chain}
	for len(c.frames) > 0 {
		if err := c.step(); err != nil {
			return err
		}
	}
	return nil
}

// step looks at the next name of the directory at hand, or goes up.
func (c *layerChanges) step() error {
	c.name = nil
	if err := c.ctx.Err(); err != nil {
		return err
	}
	d := c.walk.top()
	if err := c.walk.more(d); err != nil {
		return err
	}
	name, typ := d.take()
	if name == nil {
		return c.leave()
	}
	c.name = name
	f := &c.frames[len(c.frames)-1]
	now := &c.now
	*now = fileAt{dirfd: d.fd, name: name}
	var err error
	if f.view != nil {
		var e lowerEntry
		if e, err = f.view.lookup(name.String()); err == nil && !e.exists {
			err = ErrChanged
		}
		now.dirfd, now.st = e.dirfd, sys.FromStat(&e.st)
		typ = uint8(now.st.Mode >> 12) // as IFTODT does
	}
	if err != nil {
		return err
	}
	if f.base == nil {
		return c.added(f, now, typ)
	}
	e, err := f.base.lookup(name.String())
	if err != nil {
		return err
	}
	if !e.exists {
		return c.added(f, now, typ)
	}
	return c.both(f, now, &e)
}

// added lists what the lowers don't show, and goes down into it. A whiteout of nothing is nothing.
func (c *layerChanges) added(f *changeFrame, now *fileAt, typ uint8) error {
	if f.view == nil && (typ == unix.DT_UNKNOWN || typ == unix.DT_CHR || f.marks.holdsMarks) {
		white, err := c.stat(f, now)
		if err != nil || white {
			return err
		}
		typ = uint8(now.st.Mode >> 12)
	}
	c.list.add(now.name, Added)
	if typ != unix.DT_DIR {
		return nil
	}
	return c.enter(f, now, nil, true)
}

// stat reads the metadata of an entry of the layer itself, and says whether it is a whiteout.
func (c *layerChanges) stat(f *changeFrame, now *fileAt) (white bool, err error) {
	if err := sys.StatName(now.dirfd, now.name, &now.st); err != nil {
		return false, err
	}
	st := &now.st
	if st.Type() == unix.S_IFCHR && st.Major == 0 && st.Minor == 0 {
		return true, nil
	}
	if !f.marks.holdsMarks || st.Type() != unix.S_IFREG || st.Size != 0 {
		return false, nil
	}
	_, err = sys.Getxattrat(now.dirfd, now.name.String(), c.format.xattrPrefix()+"whiteout")
	if noXattr(err) {
		return false, nil
	}
	return err == nil, err
}

// both compares what the layer has with what the lowers show by the same name.
func (c *layerChanges) both(f *changeFrame, now *fileAt, e *lowerEntry) error {
	if f.view == nil {
		white, err := c.stat(f, now)
		if err != nil {
			return err
		}
		if white {
			c.list.add(now.name, Deleted)
			return nil
		}
	}
	name := now.name.String()
	before := fileAt{dirfd: e.dirfd, name: now.name, st: sys.FromStat(&e.st), open: func() (int, error) { return f.base.openData(name) }}
	now.open = func() (int, error) { return c.openData(f, now) }
	same, err := c.files.same(now, &before)
	if err != nil {
		return err
	}
	isDir := now.st.Type() == unix.S_IFDIR
	if same && !isDir && now.st.Nlink > 1 {
		c.sameLink(now)
	}
	if !same || isDir {
		c.list.add(now.name, Modified)
	}
	if !isDir {
		return nil
	}
	var base *mergedDir
	if before.st.Type() == unix.S_IFDIR {
		if base, err = f.base.child(name); err != nil {
			return err
		}
	}
	return c.enter(f, now, base, !same || base == nil)
}

// sameLink records a file of the layer that is as below but has other names too. Unless
// all of them are as below, its group is torn; no other name needs to be looked at, as they all lie in the layer.
func (c *layerChanges) sameLink(now *fileAt) {
	c.links.note(&now.st, c.list.pathOf(now.name), false)
	group := c.links[inode{now.st.Dev, now.st.Ino}]
	group.changed = uint64(len(group.same)) < uint64(now.st.Nlink)
}

// openData opens the content of a file of the layer.
func (c *layerChanges) openData(f *changeFrame, now *fileAt) (int, error) {
	if f.view != nil {
		return f.view.openData(now.name.String())
	}
	fd, err := openRegular(now.dirfd, now.name)
	if err != nil {
		return -1, err
	}
	m, err := readMarks(fd, c.format)
	if err == nil && !m.metacopy {
		return fd, nil
	}
	_ = sys.Close(fd) // read only: nothing can be lost
	if err != nil {
		return -1, err
	}
	return c.lowers.dataBelow(f.low(), now.name.String(), m)
}

// enter goes down into a directory, which is the last of the list: to stay there only if
// changed, or if something is found beneath. base is what the lowers show at its path; enter
// takes it over.
func (c *layerChanges) enter(f *changeFrame, now *fileAt, base *mergedDir, changed bool) error {
	next := changeFrame{base: base}
	next.level = level{start: len(c.list.path), mark: len(c.list.changes), changed: changed}
	fd, err := c.openDir(f, now, &next)
	if err != nil {
		next.close()
		return err
	}
	c.list.path = append(append(c.list.path, '/'), now.name[:len(now.name)-1]...)
	c.frames = append(c.frames, next)
	c.park(len(c.frames) - 1 - maxOpen)
	d, err := c.walk.enter(fd)
	if err != nil {
		return err
	}
	if next.view == nil {
		if err := c.walk.list(d, fd, true); err != nil {
			return err
		}
	} else {
		names, err := next.view.names()
		if err != nil {
			return err
		}
		for _, name := range names {
			d.add([]byte(name), unix.DT_UNKNOWN)
		}
	}
	if base == nil {
		c.list.expect(d.total)
	}
	if base != nil && !next.merged {
		return c.hidden(d, &next)
	}
	return nil
}

// openDir opens a directory and finds what shows in it: fd is -1 if it is only known by its view.
func (c *layerChanges) openDir(f *changeFrame, now *fileAt, next *changeFrame) (fd int, err error) {
	name := now.name.String()
	if f.view != nil {
		if next.view, err = f.view.child(name); err == nil && next.view == nil {
			err = ErrChanged
		}
		return -1, err
	}
	fd, err = sys.OpenQuiet(now.dirfd, now.name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return -1, replaced(err)
	}
	if next.marks, err = readMarks(fd, c.format); err != nil {
		_ = sys.Close(fd)
		return -1, err
	}
	// Where the parent doesn't merge, neither does this, even if it is compared with something.
	next.merged = f.merged && !next.marks.opaque && next.marks.redirect == ""
	if next.marks.redirect != "" {
		next.view, err = c.lowers.shown(f.low(), fd, name, next.marks)
	}
	if err != nil {
		_ = sys.Close(fd)
		return -1, err
	}
	return fd, nil
}

// hidden lists what the lowers have in a directory and the layer hides as a whole: where it is
// opaque, or shows something else.
func (c *layerChanges) hidden(d *walkDir, f *changeFrame) error {
	names, err := f.base.names()
	if err != nil {
		return err
	}
	for _, text := range names {
		name := sys.MakeName(text)
		c.name = name
		if f.view != nil {
			e, err := f.view.lookup(text)
			if err != nil {
				return err
			}
			if !e.exists {
				c.list.add(name, Deleted)
			}
			continue
		}
		now := fileAt{dirfd: d.fd, name: name}
		// A whiteout among them is listed when the walk comes to it.
		if _, err := c.stat(f, &now); isNotThere(err) {
			c.list.add(name, Deleted)
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (c *layerChanges) leave() error {
	f := c.frames[len(c.frames)-1]
	c.frames = c.frames[:len(c.frames)-1]
	if !f.changed && len(c.list.changes) == f.mark {
		c.list.changes = c.list.changes[:f.mark-1]
	}
	err := c.walk.pop()
	f.close()
	c.list.path = c.list.path[:f.start]
	if top := len(c.frames) - 1; err == nil && top >= 0 && c.frames[top].parked {
		return c.unpark(top)
	}
	return err
}

// park closes the base of a frame far up. That of the root stays: all others are found from it.
func (c *layerChanges) park(i int) {
	if i <= 0 || c.frames[i].base == nil || c.frames[i].parked {
		return
	}
	c.frames[i].base.close()
	c.frames[i].base, c.frames[i].parked = nil, true
}

// unpark opens the base of the frame at hand again, and those of the next ones up.
func (c *layerChanges) unpark(top int) error {
	from := top
	for c.frames[from].parked {
		from--
	}
	for i := from + 1; i <= top; i++ {
		f := &c.frames[i]
		end := len(c.list.path)
		if i < top {
			end = c.frames[i+1].start
		}
		var err error
		f.base, err = c.frames[i-1].base.child(string(c.list.path[f.start+1 : end]))
		if err == nil && f.base == nil {
			err = ErrChanged
		}
		if err != nil {
			return err
		}
		f.parked = false
		if i-1 > from && i-1 <= top-maxOpen {
			c.park(i - 1)
		}
	}
	return nil
}
