//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// childScan looks at all layers: for a child of one whose list does not tell, and, since that takes long where they are
// many, to seal the lists of all that have no seal that holds, so that the next one need not.
type childScan struct {
	d *Driver
	s *staging
	// layers has all layers by link, nil for one with a seal that holds.
	layers map[string]*unsealedLayer
	// now is before any layer was looked at; see committedStateAt.
	now unix.Timespec
	// doubt says that the parent of some layer is not known, so that nothing can be sealed.
	doubt bool
}

type unsealedLayer struct {
	id       string
	state    string // of committed, before the chains were read
	settled  bool   // so that the state tells of each change since
	children []string
}

// lookAtAll returns a layer that has one of links, those of l, in its chain, "" if there is none.
func (d *Driver) lookAtAll(s *staging, l *layer, links []string) (child string, err error) {
	c := &childScan{d: d, s: s, layers: map[string]*unsealedLayer{}}
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &c.now); err != nil {
		return "", err
	}
	names, err := s.layerNames()
	if err != nil {
		return "", err
	}
	// The states come first: a child that appears after its parent's state was read breaks that, or is listed.
	for _, id := range names {
		if err := c.readState(id); err != nil {
			return "", fmt.Errorf("%s: %w", id, err)
		}
	}
	if names, err = s.layerNames(); err != nil {
		return "", err
	}
	for _, id := range names {
		has, err := c.readChain(id, links)
		if err != nil {
			return id, err
		}
		if has && id != l.id && child == "" {
			child = id
		}
	}
	if !c.doubt {
		c.sealAll(l, child != "")
	}
	return child, nil
}

// layerNames lists the home, but for the driver's own.
func (s *staging) layerNames() (names []string, err error) {
	homefd, err := sys.OpenDirat(s.homefd, ".")
	if err != nil {
		return nil, err
	}
	defer func() { _ = sys.Close(homefd) }()
	err = sys.ReadNames(homefd, func(name string) bool {
		if checkID(name) == nil {
			names = append(names, name)
		}
		return true
	})
	return names, err
}

// readState takes up a layer if its list has no seal that holds.
func (c *childScan) readState(id string) error {
	q, err := openLayer(c.d.home, id)
	if exhausted(err) {
		return err
	}
	if err != nil {
		return nil // gone, or no layer
	}
	defer q.close()
	listfd, odd, err := q.openList()
	if err != nil {
		return err
	}
	if listfd >= 0 {
		defer func() { _ = sys.Close(listfd) }()
	}
	whole, err := c.d.listsAll(q, listfd)
	if err != nil {
		return err
	}
	committed, settled, err := q.committedStateAt(c.now)
	if err != nil {
		return err
	}
	link, err := q.link()
	if exhausted(err) {
		return err
	}
	if err != nil {
		return nil // damaged: if a chain holds its link nothing is sealed
	}
	target, err := sys.Readlinkat(c.s.homefd, linkPrefix+link)
	if exhausted(err) {
		return err
	}
	_, twice := c.layers[link]
	c.doubt = c.doubt || twice || err != nil || target != linkTarget(id) && target != incompleteTarget(id)
	c.layers[link] = nil
	if !whole && !odd {
		c.layers[link] = &unsealedLayer{id: id, state: committed, settled: settled}
	}
	return nil
}

// readChain reports whether the layer has one of links in its chain, and notes it with its parent.
func (c *childScan) readChain(id string, links []string) (bool, error) {
	data, err := sys.ReadFileAt(c.s.homefd, id+"/"+lowerName, maxLowerFile)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		// A base layer, or its chain is lost.
		var st unix.Stat_t
		c.doubt = c.doubt || sys.Fstatat(c.s.homefd, id+"/"+workName, &st) == nil
		return false, nil
	}
	if err == unix.ELOOP || errors.Is(err, sys.ErrNotRegular) {
		c.doubt = true
		return false, nil
	}
	if err != nil {
		return false, err
	}
	lowers, err := parseLower(string(data))
	if err != nil {
		c.doubt = true
	} else if parent, ok := c.layers[lowers[0]]; !ok {
		c.doubt = true
	} else if parent != nil {
		parent.children = append(parent.children, id)
	}
	// What the file says beside is not looked at: a damaged one may still be mended, and needs its parents then.
	return slices.ContainsFunc(links, func(link string) bool { return strings.Contains(string(data), link) }), nil
}

// sealAll seals what can be sealed. What cannot stays as it was: it costs the next one another look.
func (c *childScan) sealAll(l *layer, stays bool) {
	for _, q := range c.layers {
		if q == nil || q.id == l.id && !stays {
			continue // it is going to be removed
		}
		if err := c.seal(q, l); err != nil {
			c.d.log.WithError(err).WithField("layer", q.id).Debug("overlay2: the list of its children is not sealed")
		}
	}
}

// seal completes the list of a layer and seals it. Held is the layer that the caller has to itself.
func (c *childScan) seal(q *unsealedLayer, held *layer) (err error) {
	l := held
	if q.id != held.id {
		if l, err = openLayer(c.d.home, q.id); err != nil {
			return err
		}
		defer l.close()
		// Not awaited: who removes it, or fills it, needs no help.
		if err := sys.Flock(l.fd, unix.LOCK_SH|unix.LOCK_NB); err != nil {
			return err
		}
		if !l.isThere() {
			return ErrLayerNotFound
		}
	}
	state, err := l.committedState()
	if err != nil || state != q.state || !q.settled {
		return errors.Join(errors.New("it has got a child meanwhile"), err)
	}
	listfd := -1
	if state != unparented {
		if listfd, err = l.makeList(); err != nil || listfd < 0 {
			return err
		}
		defer func() { _ = sys.Close(listfd) }()
	} else if len(q.children) > 0 {
		return corrupt("%s: %w, although layer %s is built on it", committedName, unix.ENOENT, q.children[0])
	}
	for _, id := range q.children {
		var buf [linkid.Length + 1]byte
		link, err := sys.ReadStartAt(c.s.homefd, id+"/"+linkName, buf[:])
		if err != nil || !linkid.Valid(string(link)) {
			return errors.Join(corrupt("%s/%s", id, linkName), err)
		}
		name, target := childEntry(string(link), id)
		if err := sys.Symlinkat(target, listfd, name); err != nil && err != unix.EEXIST {
			return err
		}
	}
	return c.d.setSeal(l, listfd, state)
}
