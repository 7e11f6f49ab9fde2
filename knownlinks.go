//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

const (
	// maxKnownLinks bounds the memory of knownLinks: some hundred bytes each.
	maxKnownLinks = 1 << 14
	// maxHeldDirs and heldDirsPart bound the layers that knownLinks holds open: that many, and that part of
	// the descriptors that the process may have. Each takes heldFDs of them.
	maxHeldDirs  = 1024
	heldDirsPart = 4
	heldFDs      = 2
	// settleTime is how old a time of change must be to tell of every later change: before Linux 6.13
	// (multigrain timestamps) two changes within a tick, of 10 ms at most, have the same time.
	settleTime = 50 * time.Millisecond
)

// knownLinks remembers which directory the link of a layer led to when it was last followed
// strictly (see resolveLink), so that the layers of each mount are checked by hardly a call. There
// are three ways to know that nothing has changed that matters:
//
//   - The kernel, which watches l/ and the layer's directory, has told of no change: one call for all links.
//   - The directory l/ is as it was, so the link still names that layer; and the layer's directory, which
//     is held open, is as it was, so its diff is still the directory that it was. The latter is
//     asked of a descriptor, without walking any name.
//   - The kernel, asked by the link, comes to the very same directory.
//
// Whatever fails all is followed strictly again; so what is remembered saves time and decides nothing.
type knownLinks struct {
	mu   sync.Mutex
	m    map[string]knownLink // by link
	held int                  // entries of m that hold a directory
	// l is how the directory l/ was last seen, and gen counts how often it was another.
	l   sys.DirState
	gen uint64
	// settle is settleTime, or 0 where each change has a time of its own. Immutable after New.
	settle time.Duration
	// maxHeld bounds held. Immutable after New.
	maxHeld int
	watches watches
	// ready are chains by readyKey, as they were mounted when watches.kills was readyKills.
	ready      map[string]*readyChain
	readyKills uint64
}

// descriptorsFor returns how many times each descriptors are one part-th of those that the process may have, at most most.
func descriptorsFor(each, part, most uint64) int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0
	}
	return int(min(l.Cur/part/each, most))
}

type knownLink struct {
	id   string
	name sys.Name // the link, as the kernel wants it
	diff sys.Ident
	dir  *heldDir
	// gen is knownLinks.gen when the link was last followed with l/ settled, 0 if never.
	gen uint64
	// watch is nil if dir is not watched. What it says is protected by knownLinks.mu, for copies too.
	watch *watch
}

// heldDir is the directory of a layer, held open, and the diff in it.
type heldDir struct {
	fd, diff int       // O_PATH
	ident    sys.Ident // of diff
	refs     atomic.Int32
	// state is how it was before its diff was found to be that of the link.
	state sys.DirState
	// settled says that any later change is to be seen by the state. Otherwise only a watch tells of it.
	settled bool
}

func (h *heldDir) unref() {
	if h != nil && h.refs.Add(-1) == 0 {
		_ = sys.Close(h.fd) // O_PATH: nothing can be lost
		if h.diff >= 0 {
			_ = sys.Close(h.diff)
		}
	}
}

// unchanged reports whether the directory is surely as it was. It is false for nil.
func (h *heldDir) unchanged() bool {
	if h == nil || !h.settled {
		return false
	}
	now, err := sys.StateFd(h.fd)
	return err == nil && now == h.state
}

// still reports whether the link leads where it did. lfd is l/, open.
func (l *knownLink) still(lfd int) bool {
	if l.id == "" {
		return false
	}
	now, err := sys.IdentDir(lfd, l.name)
	return err == nil && now.Same(l.diff)
}

// lookup returns what is known of each link, an empty knownLink if nothing is, and which of them surely lead where
// they did: those whose watch holds. base is true if the last of these is surely a base layer. l is the state of l/. The caller
// unrefs the directories.
func (k *knownLinks) lookup(links []string, l sys.DirState) (known []knownLink, sure []bool, base bool) {
	known, sure = make([]knownLink, len(links)), make([]bool, len(links))
	k.mu.Lock()
	defer k.mu.Unlock()
	k.readWatches()
	watching := k.watches.on && k.watches.l.SameDir(l)
	for i, link := range links {
		known[i] = k.m[link]
		if known[i].dir != nil {
			known[i].dir.refs.Add(1)
		}
		w := known[i].watch
		sure[i] = w != nil && watching && w.ok
		base = sure[i] && w.base
	}
	return known, sure, base
}

// surely reports whether the watches say that the first of links leads to the layer id, whose own it is and who is there, and that
// the last is a base layer's. It costs no call where nothing is watched.
func (k *knownLinks) surely(lfd int, id string, links []string) (here, base bool) {
	k.mu.Lock()
	watching := k.watches.on
	k.mu.Unlock()
	if !watching {
		return false, false
	}
	l, err := sys.StateMounted(lfd)
	if err != nil {
		return false, false
	}
	known, sure, base := k.lookup([]string{links[0], links[len(links)-1]}, l)
	for i := range known {
		known[i].dir.unref()
	}
	return sure[0] && known[0].id == id, base
}

// add remembers a link, with a reference of its own to the directory.
func (k *knownLinks) add(link string, l knownLink) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.put(link, l)
}

// put is add. mu is held.
func (k *knownLinks) put(link string, l knownLink) {
	if k.m == nil || len(k.m) >= maxKnownLinks || k.held >= k.maxHeld && l.dir != nil {
		k.clear()
	}
	k.drop(link)
	if l.dir != nil {
		l.dir.refs.Add(1)
		k.held++
	}
	k.m[link] = l
}

// forget is called when a link leads nowhere any more.
func (k *knownLinks) forget(link string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.drop(link)
}

// forgetAll closes all that is held.
func (k *knownLinks) forgetAll() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.clear()
	k.watches.off = false
}

// drop removes an entry. mu is held.
func (k *knownLinks) drop(link string) {
	if l, ok := k.m[link]; ok {
		k.watches.drop(l.watch)
		if k.watches.kills != k.readyKills { // what they hold is gone, too
			k.dropReady()
		}
		if l.dir != nil {
			k.held--
			l.dir.unref()
		}
		delete(k.m, link)
	}
}

// clear removes all entries. mu is held.
func (k *knownLinks) clear() {
	for _, l := range k.m {
		l.dir.unref()
	}
	k.m, k.held = make(map[string]knownLink), 0
	k.watches.stop()
	k.dropReady()
}

// generation returns a number that is the same as long as l/ is, 0 if that cannot be told. state is that of l/ after now.
func (k *knownLinks) generation(state sys.DirState, now time.Time) uint64 {
	if !state.SettledAt(now, k.settle) {
		return 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if state != k.l {
		k.l = state
		k.gen++
	}
	return k.gen
}

// resolve returns the layer ID that each link of a chain stands for, as the function resolve does.
func (d *Driver) resolve(links []string) ([]string, error) {
	if len(links) == 0 {
		return nil, nil
	}
	c, err := d.openChain(links)
	if err != nil {
		return nil, err
	}
	defer c.close()
	ids := make([]string, len(links))
	for i := range links {
		if err := c.check(i); err != nil {
			return nil, err
		}
		ids[i] = c.known[i].id
	}
	return ids, nil
}

// chain is a layer's link and those below it, as a mount needs them: each is checked just
// before the kernel follows it, while what that takes is at hand in the processor's caches.
type chain struct {
	d     *Driver
	lfd   int          // l/, open
	l     sys.DirState // of l/
	gen   uint64       // see knownLinks.generation
	links []string
	known []knownLink
	sure  []bool // see knownLinks.lookup
	// checked says that all have been, a moment ago, when one way to mount was looked at before another.
	checked bool
}

// openLinks opens l/ for some links, of which nothing is known yet. The caller closes the chain.
func (d *Driver) openLinks(links []string) (*chain, error) {
	lfd, err := sys.OpenRoot(d.home + "/" + linkDir)
	if err != nil {
		return nil, corrupt("%s: %w", linkDir, err)
	}
	c := &chain{d: d, lfd: lfd, links: links}
	now := time.Now()
	// Of the very mount: what is held open of another one, which was detached since, can be no layer of a new mount.
	if c.l, err = sys.StateMounted(lfd); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", linkDir, err), sys.Close(lfd))
	}
	c.gen = d.known.generation(c.l, now)
	return c, nil
}

// openChain takes up the links. The caller closes it.
func (d *Driver) openChain(links []string) (*chain, error) {
	c, err := d.openLinks(links)
	if err != nil {
		return nil, err
	}
	var base bool
	if c.known, c.sure, base = d.known.lookup(links, c.l); base {
		return c, nil
	}
	if err := checkEnd(c.lfd, links); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *chain) close() {
	_ = sys.Close(c.lfd) // opened for reading: nothing can be lost
	for i := range c.known {
		c.known[i].dir.unref()
	}
}

// checkOwn checks the first link, which is that of l.
func (c *chain) checkOwn(l *layer) error {
	if err := c.check(0); err != nil {
		return err
	}
	if c.known[0].id != l.id {
		return corrupt("%s: %s is the link of layer %s", linkName, c.links[0], c.known[0].id)
	}
	return nil
}

// check checks one link.
func (c *chain) check(i int) error {
	if c.sure[i] {
		return nil
	}
	k := &c.known[i]
	unchanged := k.dir.unchanged()
	if unchanged && c.gen != 0 && k.gen == c.gen {
		if began, ok := c.watch(i); !began || ok {
			return nil
		}
		return c.follow(i)
	}
	if !unchanged { // the diff in it may be another by now: nothing is mounted by it
		k.dir.unref()
		k.dir = nil
	}
	if k.still(c.lfd) {
		// A mount makes use of what is held only if all are.
		if i == 0 || len(c.links) > c.d.known.maxHeld || c.hold(i) {
			return nil
		}
	}
	return c.follow(i)
}

// follow follows one link strictly.
func (c *chain) follow(i int) error {
	homefd, err := sys.OpenDirat(c.lfd, "..")
	if err != nil {
		return err
	}
	defer func() { _ = sys.Close(homefd) }()
	c.known[i].dir.unref()
	if c.known[i], err = resolveLink(homefd, c.lfd, c.links[i]); err != nil {
		c.d.known.forget(c.links[i])
		return err
	}
	c.d.known.add(c.links[i], c.known[i])
	return nil
}

// hold remembers that the link was followed with l/ as it is, and holds the layer's directory open
// if it does not yet. What does not succeed costs time only; it returns false if it has seen that the link is to be followed strictly.
func (c *chain) hold(i int) bool {
	k := &c.known[i]
	opened := k.dir == nil
	if opened {
		if k.dir = c.openDir(k.id); k.dir == nil {
			return true
		}
	}
	k.gen, k.watch = c.gen, nil
	began, ok := c.watch(i)
	switch {
	case began && ok:
		return true
	case began: // what is remembered with the watch is not so
		c.d.known.forget(c.links[i])
	case !opened || k.dir.settled && c.leadsTo(k):
		c.d.known.add(c.links[i], *k)
		return true
	}
	k.dir.unref() // nothing is mounted by it
	k.dir, k.watch = nil, nil
	return !began
}

// openDir opens the directory of a layer. It returns nil if that does not succeed.
func (c *chain) openDir(id string) *heldDir {
	now := time.Now()
	fd, err := sys.Openat(c.lfd, "../"+id, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil
	}
	h := &heldDir{fd: fd, diff: -1}
	h.refs.Store(1)
	if h.state, err = sys.StateFd(fd); err == nil {
		if h.diff, err = sys.Openat(fd, diffName, unix.O_PATH|unix.O_DIRECTORY, 0); err == nil {
			h.ident, err = sys.IdentFd(h.diff)
		}
	}
	if err != nil {
		h.unref()
		return nil
	}
	h.settled = h.state.SettledAt(now, c.d.known.settle)
	return h
}

// leadsTo reports whether the link leads to the diff that is held, and that is still in the directory that is held, and no symlink.
func (c *chain) leadsTo(k *knownLink) bool {
	if !k.dir.ident.Same(k.diff) || !k.still(c.lfd) {
		return false
	}
	diff, err := sys.IdentDir(k.dir.fd, sys.MakeName(diffName))
	return err == nil && diff.Same(k.diff) && sys.IsDirat(k.dir.fd, diffName) == nil
}

// held returns names of the diffs of the layers from the first on that need hardly a walk: the descriptors that are
// held, with a prefix before the number of each. They are nil unless all are, and good until close. The links are
// checked. The layer at the top is not held, as each Get and Put changes its directory.
func (c *chain) held(first int, prefix string) []string {
	names := make([]string, 0, len(c.known)-first)
	if first == 0 {
		names = append(names, prefix+strconv.Itoa(c.lfd)+"/"+c.links[0])
		first++
	}
	for i := first; i < len(c.known); i++ {
		h := c.known[i].dir
		if h == nil {
			return nil
		}
		names = append(names, prefix+strconv.Itoa(h.diff))
	}
	return names
}
