//go:build linux

package overlay2

import (
	"errors"
	"maps"
	"slices"
	"sync"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

const (
	// maxKeptLayers and keptLayersPart bound the layers that a Driver keeps open after their Put: that many, and that
	// part of the descriptors that the process may have. Each takes keptFDs of them.
	maxKeptLayers  = 128
	keptLayersPart = 16
	keptFDs        = 2
	// maxGotLayers bounds the memory of IDs.
	maxGotLayers = 1 << 12
)

// keptLayer is a layer to be written that was got and put before, with its directories open and its own directory
// watched: as long as the kernel tells of no change there, the next Get need not read it again.
//
// It belongs to the layer's state while that is in use, then to keptLayers, and to nobody else.
type keptLayer struct {
	l    *layer
	diff *use
	// link is the host path of its link in l/, and ident what that leads to: the diff. Looking there tells that the layer has
	// not been removed, and that the home is not another one.
	link  sys.Name
	ident sys.Ident
	own   string // the link's name
	lower string // content of the file
	watch *watch
	// said is what was last said to mount(2), for the chain ready with this label.
	said  sys.Name
	ready *readyChain
	label string
}

// keptLayers are those that are not in use now.
type keptLayers struct {
	mu  sync.Mutex
	m   map[string]*keptLayer // by ID
	got map[string]struct{}   // IDs of layers that could have been kept, had they been watched
	n   int                   // of m, and those in use
	// max bounds n. Immutable after New.
	max int
}

// take returns what is kept of the layer, nil if nothing is. It is the caller's then.
func (t *keptLayers) take(id string) *keptLayer {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.m[id]
	delete(t.m, id)
	return k
}

// give takes back what is in use no more.
func (t *keptLayers) give(k *keptLayer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.m == nil {
		t.m = make(map[string]*keptLayer)
	}
	t.m[k.l.id] = k
}

// seen is called when a layer was got that can be kept from the next time on. The first Get of a layer is often the only one.
func (t *keptLayers) seen(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.got == nil || len(t.got) >= maxGotLayers {
		t.got = make(map[string]struct{})
	}
	t.got[id] = struct{}{}
}

// admit reports whether a layer is to be kept, which counts it.
// Evicted, if not nil, has to make room: the caller drops it.
func (t *keptLayers) admit(id string) (ok bool, evicted *keptLayer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, again := t.got[id]; !again {
		return false, nil
	}
	delete(t.got, id)
	if t.n < t.max {
		t.n++
		return true, nil
	}
	for other, k := range t.m { // any
		delete(t.m, other)
		t.n++ // drop takes one off
		return true, k
	}
	return false, nil
}

// forget is called when the layer is removed. What it returns, unless nil, the caller drops.
func (t *keptLayers) forget(id string) *keptLayer {
	t.mu.Lock()
	delete(t.got, id)
	t.mu.Unlock()
	return t.take(id)
}

// takeAll returns all that are not in use.
func (t *keptLayers) takeAll() []*keptLayer {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := slices.Collect(maps.Values(t.m))
	t.m, t.got = nil, nil
	return all
}

// dropKept closes what is kept of a layer, or would have been, and ends its use if there is one.
func (d *Driver) dropKept(k *keptLayer) {
	if k == nil {
		return
	}
	d.known.unwatch(k.watch)
	if k.diff != nil {
		k.diff.kept = false
		k.diff.drop()
	}
	if k.l != nil {
		k.l.kept = false
		k.l.close()
	}
	d.kept.mu.Lock()
	defer d.kept.mu.Unlock()
	d.kept.n--
}

// dropAllKept closes all that are not in use.
func (d *Driver) dropAllKept() {
	for _, k := range d.kept.takeAll() {
		d.dropKept(k)
	}
}

// beginKeeping begins to watch a layer that is about to be mounted, if it is to be kept, nil otherwise. What is known of the
// layer has to be asked afterwards.
func (d *Driver) beginKeeping(l *layer) *keptLayer {
	ok, evicted := d.kept.admit(l.id)
	d.dropKept(evicted)
	if !ok {
		return nil
	}
	k := &keptLayer{}
	if k.watch = d.known.watchOwn(l.fd); k.watch == nil {
		d.dropKept(k)
		return nil
	}
	return k
}

// keep makes k, whose own, lower and ident were found out since it was begun, what is kept of the layer with this use. It returns
// false if something has changed meanwhile.
func (d *Driver) keep(k *keptLayer, l *layer, u *use) bool {
	diff, err := sys.IdentFd(u.fd)
	if k.own == "" || err != nil || !diff.Same(k.ident) || !d.known.settleOwn(k.watch) {
		return false
	}
	k.l, k.diff = l, u
	k.l.kept, k.diff.kept = true, true
	k.link = sys.MakeName(d.home + "/" + linkPrefix + k.own)
	return true
}

// getKept is get for a layer that is kept. It returns false if it is not, or not surely as it was: nothing
// has been done then.
func (d *Driver) getKept(id string, state *layerState, opts MountOpts) (path string, ok bool, err error) {
	if state.mounts > 0 {
		return "", false, nil
	}
	k := d.kept.take(id)
	if k == nil {
		return "", false, nil
	}
	if opts.IDMap.Empty() {
		ok, err = d.mountKept(k, state, opts)
	}
	if !ok || err != nil {
		err = k.l.gone(err)
		d.dropKept(k)
		return "", ok, err
	}
	k.l.close()
	state.use, state.kept, state.plain = k.diff, k, false
	state.owners = archive.IDMap{}
	return k.l.path(mergedName), true, nil
}

// mountKept mounts a layer that is kept, and counts the uses. Afterwards its directory is locked.
func (d *Driver) mountKept(k *keptLayer, state *layerState, opts MountOpts) (ok bool, err error) {
	if err := sys.Flock(k.l.fd, unix.LOCK_EX); err != nil {
		return false, err
	}
	diff, err := sys.IdentDir(unix.AT_FDCWD, k.link)
	if err != nil || !diff.Same(k.ident) {
		return false, nil // whoever reads it says what is wrong
	}
	spec, ok := d.keptSpec(k, opts.Label)
	if !ok {
		return false, nil
	}
	defer d.known.releaseReady(spec.ready)
	if err := sys.Flock(k.diff.fd, unix.LOCK_SH); err != nil {
		return false, err
	}
	adopted, err := d.mountAtMerged(k.l, archive.IDMap{}, func() error { return d.mountOverlay(k.l, spec, archive.IDMap{}) })
	if errors.Is(err, errNotReady) {
		d.known.forgetReady()
		return false, nil
	}
	if adopted && err == nil {
		adopted, err = k.diff.only()
	}
	if err != nil {
		return true, err
	}
	state.mounts++
	if adopted {
		state.mounts++
	}
	return true, nil
}

// keptSpec is readySpec for a layer that is kept.
func (d *Driver) keptSpec(k *keptLayer, label string) (spec mountSpec, ok bool) {
	ready := d.known.lookupKept(k.watch, k.lower)
	if ready == nil {
		return spec, false
	}
	spec = d.writableSpec(nil, k.own)
	spec.label, spec.ready = label, ready
	if k.ready != ready || k.label != label {
		k.said, k.ready, k.label = spec.sayReady(), ready, label
	}
	if spec.said = k.said; spec.said == nil {
		d.known.releaseReady(ready)
		return spec, false
	}
	return spec, true
}

// putKept is put for the last use of a layer that is kept. It returns false if it is not, or cannot be used on: nothing has
// been done then.
func (d *Driver) putKept(state *layerState) (ok bool, err error) {
	k := state.kept
	if k == nil || state.mounts != 1 {
		return false, nil
	}
	if !k.l.kept {
		k.diff.kept = false
		k.diff = nil // the use goes on
		d.dropKept(k)
		state.kept = nil
		return false, nil
	}
	err = k.l.endUse(state, func() error { return d.unmountMerged(k.l) })
	k.l.close()
	if state.mounts > 0 {
		return true, err
	}
	state.kept = nil
	if err == nil && k.l.kept && k.diff.kept {
		d.kept.give(k)
	} else {
		d.dropKept(k)
	}
	return true, err
}
