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
