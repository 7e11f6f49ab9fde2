//go:build linux

package overlay2

import (
	"github.com/bcc2decd/overlay2/internal/sys"
)

// watches tells which of the links that knownLinks remembers have been touched since, by whatever process, without a
// call for each: the kernel notes changes of l/ and of the layers' directories (inotify), and one call reads
// what it has noted. Where there are no watches left, directories are looked at one by one.
//
// All is protected by knownLinks.mu.
type watches struct {
	fd   int // good if on
	on   bool
	off  bool // there are none to be had, until all is forgotten
	full bool // there are no more to be had, until one ends
	lwd  int  // of l/
	l    sys.DirState
	byWD map[int]*watch
	buf  []byte
	// kills counts the watches that told of something, or ended.
	kills uint64
}

// watch is the watch of a layer's directory, from when it is opened until something was touched.
type watch struct {
	wd int
	// ok says that since the watch began the link was followed strictly, to the directory that is held, and nothing has
	// been touched.
	ok, dead bool
	// base says that the layer is a base layer.
	base bool
	// own says that it is of a layer that is kept, not of one below another.
	own bool
}

// watchSize holds some hundred changes.
const watchSize = 16 << 10

// untold are names in a layer's directory that say nothing of what its link leads to.
var untold = map[string]bool{mergedName: true, committedName: true, childrenName: true, listedName: true}

// tells reports whether a change of name in the directory matters. One that is committed is not to be written any more.
func (one *watch) tells(name string) bool {
	return !untold[name] || name == committedName && one != nil && one.own
}

// start begins to watch l/.
func (w *watches) start(lfd int, l sys.DirState) bool {
	if w.on && w.l.SameDir(l) {
		return true
	}
	if w.off {
		return false
	}
	w.stop()
	fd, err := sys.OpenWatches()
	if err == nil {
		w.fd, w.on = fd, true
		w.lwd, err = sys.Watch(fd, lfd)
	}
	if err != nil {
		w.stop()
		w.off = true
		return false
	}
	w.l, w.byWD = l, map[int]*watch{}
	if w.buf == nil {
		w.buf = make([]byte, watchSize)
	}
	return true
}

// add watches a directory, which is open, if there are watches left.
func (w *watches) add(dirfd int) (wd int, ok bool) {
	if w.full {
		return 0, false
	}
	wd, err := sys.Watch(w.fd, dirfd)
	w.full = err != nil
	return wd, err == nil
}

// stop ends all watches.
func (w *watches) stop() {
	for _, one := range w.byWD {
		w.kill(one)
	}
	if w.on {
		_ = sys.Close(w.fd) // opened for reading: nothing can be lost
	}
	w.on, w.full, w.byWD = false, false, nil
}

// drop ends a watch.
func (w *watches) drop(one *watch) {
	if one == nil {
		return
	}
	w.kill(one)
	if w.on && w.byWD[one.wd] == one {
		sys.Unwatch(w.fd, one.wd)
		delete(w.byWD, one.wd)
		w.full = false
	}
}

func (w *watches) kill(one *watch) {
	if one != nil {
		if one.ok && !one.own {
			w.kills++
		}
		one.ok, one.dead = false, true
	}
}

// readWatches takes up what has been touched. mu is held.
func (k *knownLinks) readWatches() {
	w := &k.watches
	if !w.on {
		return
	}
	lost := false
	err := sys.ReadWatches(w.fd, w.buf, func(wd int, mask uint32, name string) {
		switch {
		case wd < 0: // there was too much to tell
			lost = true
		case wd == w.lwd:
			lost = lost || mask&sys.WatchLost != 0
			w.kill(k.m[name].watch)
		case mask&sys.WatchLost != 0 || w.byWD[wd].tells(name):
			w.kill(w.byWD[wd])
		}
	})
	if lost || err != nil {
		w.stop()
	}
}

// watch watches the directory that is held for a link which was followed a moment ago, and looks, since nothing goes
// unnoticed then, whether the link leads there. Began is false if it cannot be watched; then what is remembered of the
// link is as it was.
func (c *chain) watch(i int) (began, ok bool) {
	k, known := &c.known[i], &c.d.known
	one := &watch{}
	if !known.beginWatch(c, i, one) {
		return false, false
	}
	// However young the directory's last change is.
	ok = c.leadsTo(k) && checkNamed(c.lfd, "../"+k.id, c.links[i]) == nil
	one.base = ok && checkEnd(c.lfd, c.links[i:i+1]) == nil
	known.mu.Lock()
	defer known.mu.Unlock()
	known.readWatches()
	one.ok = ok && !one.dead
	return true, ok
}

// beginWatch begins to watch the directory that is held for a link. What is remembered of the link has the watch then.
func (k *knownLinks) beginWatch(c *chain, i int, one *watch) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.watches.full || !k.watches.start(c.lfd, c.l) {
		return false
	}
	wd, ok := k.watches.add(c.known[i].dir.fd)
	if !ok {
		return false
	}
	one.wd = wd
	k.watches.kill(k.watches.byWD[wd])
	k.watches.byWD[wd] = one
	c.known[i].watch = one
	k.put(c.links[i], c.known[i])
	return true
}

// watchOwn begins to watch the directory of a layer that is to be kept, which is open. It returns nil if it cannot be watched,
// or is so as one below another layer.
func (k *knownLinks) watchOwn(fd int) *watch {
	k.mu.Lock()
	defer k.mu.Unlock()
	w := &k.watches
	if !w.on {
		return nil
	}
	wd, ok := w.add(fd)
	if !ok {
		return nil
	}
	if old := w.byWD[wd]; old != nil && !old.dead {
		return nil
	}
	one := &watch{wd: wd, own: true}
	w.byWD[wd] = one
	return one
}

// settleOwn reports whether nothing has changed since watchOwn, while the layer was looked at.
func (k *knownLinks) settleOwn(one *watch) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.readWatches()
	one.ok = !one.dead
	return one.ok
}

// unwatch ends a watch.
func (k *knownLinks) unwatch(one *watch) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.watches.drop(one)
}

// lookupKept returns the chain with this lower file if that and the layer above it, which is watched, are surely what they
// were, nil otherwise. The caller releases it.
func (k *knownLinks) lookupKept(one *watch, lower string) *readyChain {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.readWatches()
	if !one.ok {
		return nil
	}
	return k.takeReady(lower)
}
