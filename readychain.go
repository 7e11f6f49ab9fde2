//go:build linux

package overlay2

import (
	"errors"
	"fmt"

	"github.com/bcc2decd/overlay2/internal/sys"
)

// maxReadyChains bounds the memory of ready chains: some kilobytes each.
const maxReadyChains = 64

// readyChain is what was said to mount(2) of the layers below a layer, all of them watched at that time. As long as the kernel
// tells of no change it can be said again, for any layer with the same parent, and nothing need be looked at one by one.
type readyChain struct {
	lower    string // the content of the lower file
	lowerdir string // the option's value
	dir      string // the directory that its names are relative to, "" if they are absolute
	dirs     []*heldDir
	refs     int // one is the cache's. Protected by knownLinks.mu.
}

// readyKey returns the first link in the content of a lower file, the key of ready chains; "" if it is none.
func readyKey(lower string) string {
	if len(lower) < linkRoom-1 {
		return ""
	}
	return lower[:linkRoom-1]
}

// mayBeReady reports without a call whether it is worth a try.
func (k *knownLinks) mayBeReady(lower string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.ready[readyKey(lower)]
	return r != nil && r.lower == lower && k.watches.on && k.watches.kills == k.readyKills
}

// lookupReady returns the chain with this lower file, nil if it is not surely what it was, and what is known of the link own. l is
// the state of l/. The caller releases the chain.
func (k *knownLinks) lookupReady(own, lower string, l sys.DirState) (*readyChain, knownLink) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.readWatches()
	if !k.watches.l.SameDir(l) {
		return nil, knownLink{}
	}
	r := k.takeReady(lower)
	if r == nil {
		return nil, knownLink{}
	}
	known := k.m[own]
	return r, knownLink{id: known.id, name: known.name, diff: known.diff}
}

// takeReady returns the chain with this lower file, nil if a watch has told of a change since it was mounted. mu is held, and the
// watches have just been read.
func (k *knownLinks) takeReady(lower string) *readyChain {
	if k.watches.kills != k.readyKills {
		k.dropReady()
	}
	r := k.ready[readyKey(lower)]
	if r == nil || r.lower != lower || !k.watches.on {
		return nil
	}
	r.refs++
	return r
}

// keepReady remembers how the chain was mounted; lowerdir is not called unless it does.
func (k *knownLinks) keepReady(c *chain, r *readyChain, lowerdir func() string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.readWatches()
	if !k.watches.on || !k.watches.l.SameDir(c.l) {
		return
	}
	last := len(c.known) - 1
	for i := 1; i <= last; i++ {
		if w := c.known[i].watch; w == nil || !w.ok || i == last && !w.base {
			return
		}
	}
	if k.ready == nil || len(k.ready) >= maxReadyChains || k.watches.kills != k.readyKills {
		k.dropReady()
	}
	key := readyKey(r.lower)
	if old := k.ready[key]; old != nil {
		k.unrefReady(old)
	}
	if r.dirs != nil {
		for i := 1; i <= last; i++ {
			c.known[i].dir.refs.Add(1)
			r.dirs = append(r.dirs, c.known[i].dir)
		}
	}
	r.lowerdir, r.refs = lowerdir(), 1
	k.ready[key] = r
}

// dropReady forgets all chains. mu is held.
func (k *knownLinks) dropReady() {
	for _, r := range k.ready {
		k.unrefReady(r)
	}
	k.ready, k.readyKills = make(map[string]*readyChain), k.watches.kills
}

// unrefReady is releaseReady. mu is held.
func (k *knownLinks) unrefReady(r *readyChain) {
	if r.refs--; r.refs == 0 {
		for _, h := range r.dirs {
			h.unref()
		}
		r.dirs = nil
	}
}

func (k *knownLinks) releaseReady(r *readyChain) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.unrefReady(r)
}

// forgetReady forgets the chains that were mounted before.
func (k *knownLinks) forgetReady() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dropReady()
}

// readySpec is mountSpec for a layer to be written whose lower file is known from an earlier mount. It returns false if it is not
// surely the same now, or if it cannot be told so. kept, unless it is nil, gets what was found out of the layer. The caller releases
// what is ready.
func (d *Driver) readySpec(l *layer, lower, label string, kept *keptLayer) (spec mountSpec, ok bool, err error) {
	if d.opts.MountMethod != MountAuto || !d.known.mayBeReady(lower) {
		return spec, false, nil
	}
	own, err := l.link()
	if err != nil {
		return spec, false, err
	}
	c, err := d.openLinks([]string{own})
	if err != nil {
		return spec, false, err
	}
	defer c.close()
	c.known = make([]knownLink, 1)
	c.sure = make([]bool, 1)
	ready, known := d.known.lookupReady(own, lower, c.l)
	if ready == nil {
		return spec, false, nil
	}
	defer func() {
		if !ok || err != nil {
			d.known.releaseReady(ready)
		}
	}()
	c.known[0] = known
	if err := c.checkOwn(l); err != nil {
		return spec, false, err
	}
	if kept != nil {
		kept.own, kept.lower, kept.ident = own, lower, c.known[0].diff
	}
	spec = d.writableSpec(nil, own)
	spec.label, spec.ready = label, ready
	if spec.said = spec.sayReady(); spec.said == nil {
		return spec, false, nil
	}
	return spec, true, d.checkWork(l)
}

// sayReady returns the whole option string for a chain that is ready, nil if it is too long.
func (s mountSpec) sayReady() sys.Name {
	data := s.withRest("lowerdir="+s.ready.lowerdir, s.home+"/")
	if len(data) > sys.MaxMountData() {
		return nil
	}
	return sys.MakeName(data)
}

// errNotReady says that a chain cannot be mounted as before: another way will mount it, or say why not.
var errNotReady = errors.New("the layers below are not as they were")

// mountReady mounts a chain that is ready at target, a name relative to home.
func (s mountSpec) mountReady(target string) (err error) {
	if dir := s.ready.dir; dir == "" {
		err = sys.MountOverlayNamed(s.home+"/"+target, s.said)
	} else {
		err = sys.MountOverlayFrom(dir, s.home+"/"+target, s.said.String(), 0)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errNotReady, err)
	}
	return nil
}

// remember keeps what was mounted, lower layers with their names after prefix, or held and relative to dir.
func (s mountSpec) remember(prefix, dir string) {
	if s.lower == "" || s.upper == "" || s.chain == nil {
		return
	}
	r := &readyChain{lower: s.lower, dir: dir}
	if s.held != nil {
		r.dirs = make([]*heldDir, 0, len(s.lowers))
	}
	s.chain.d.known.keepReady(s.chain, r, func() string { return s.lowerdir(prefix) })
}
