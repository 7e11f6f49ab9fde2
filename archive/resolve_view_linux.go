package archive

import (
	"errors"

	"github.com/bcc2decd/overlay2/internal/sys"
)

// view returns what the lower layers show at the place of a directory on the stack, nil
// if nothing merges there: the layer's own is new, opaque, or replaces something else.
func (b *builder) view(n *dirNode) (*mergedDir, error) {
	if err := b.awaitLowers(); err != nil {
		return nil, err
	}
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

// awaitLowers returns when the lower layers may be looked at.
func (b *builder) awaitLowers() error {
	if b.awaited || b.lowers == nil || b.opts.LowersReady == nil {
		return nil
	}
	b.awaited = true
	return b.opts.LowersReady(b.ctx)
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
			b.keepView(n, next)
		}
	}
	return view, nil
}

// maxViewDirs is how many directories of lower layers the views on the stack keep open, so that deep trees over many
// layers need no descriptor for each directory of each. Besides, the root, the lowest open directory, the one
// that was looked at last, the highest, and the parents of both keep theirs: others would be found again and again.
const maxViewDirs = 256

// keepView notes what merges at n, and closes views nearer to the root if they have too much open.
func (b *builder) keepView(n *dirNode, view *mergedDir) {
	n.view, n.viewKnown = view, true
	if view == nil {
		return
	}
	b.viewDirs += len(view.parts)
	first := 1
	if b.firstOpen > 1 {
		first = b.firstOpen + 1 // from there limitOpen goes on
	}
	top := b.top()
	for i := first; i < len(b.stack) && b.viewDirs > maxViewDirs; i++ {
		if old := b.stack[i]; old != n && old != n.parent && old != top && old != top.parent {
			b.dropView(old)
		}
	}
}

// dropView closes what is known of a directory other than the root. It can be found again.
func (b *builder) dropView(n *dirNode) {
	if n.view == nil {
		return
	}
	b.viewDirs -= len(n.view.parts)
	n.view.close()
	n.view, n.viewKnown = nil, false
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
