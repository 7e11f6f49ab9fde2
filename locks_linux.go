package overlay2

import (
	"maps"
	"slices"
	"sync"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/sys"
)

// layerState is what a Driver knows of one layer beyond the disk. It exists while
// somebody holds or awaits the layer's lock, or while the layer is in use.
type layerState struct {
	// mu is the layer's lock: held for writing by calls on the layer, for reading by
	// calls on its children.
	mu sync.RWMutex
	// users counts who holds or awaits mu. Protected by layerTable.mu.
	users int
	// mounts counts the Gets without a Put. Protected by mu.
	mounts int
	// owners is the id map of the mount while mounts is more than 0. Protected by mu.
	owners archive.IDMap
	// plain says that the uses are of diff itself, where nothing is mounted; otherwise they are of merged. Protected by mu.
	plain bool
	// use is held while mounts is more than 0, unless the Driver was cleaned up meanwhile. Protected by mu.
	use *use
	// handed is the diff of the use that was given up then. Protected by mu.
	handed sys.Ident
	// kept is set while mounts is more than 0 if use is one of a layer that is kept. Protected by mu.
	kept *keptLayer
}

// layerTable holds the states of a Driver's layers.
//
// Lock order: the locks of layers by their IDs in bytewise order, then layerTable.mu,
// which is held for moments only.
type layerTable struct {
	mu     sync.Mutex
	states map[string]*layerState
}

// acquire returns the state of id and counts the caller as its user.
func (t *layerTable) acquire(id string) *layerState {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.states[id]
	if s == nil {
		if t.states == nil {
			t.states = make(map[string]*layerState)
		}
		s = &layerState{}
		t.states[id] = s
	}
	s.users++
	return s
}

// release drops the caller's use of s, and s itself if nothing keeps it.
func (t *layerTable) release(id string, s *layerState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.users--; s.users == 0 && s.mounts == 0 {
		delete(t.states, id)
	}
}

// lock locks a layer and returns its state and the function that unlocks it.
func (t *layerTable) lock(id string) (*layerState, func()) {
	s := t.acquire(id)
	s.mu.Lock()
	return s, func() {
		s.mu.Unlock()
		t.release(id, s)
	}
}

// lockChild locks a layer for writing and its parent, unless that is "", for reading.
func (t *layerTable) lockChild(id, parent string) (*layerState, func()) {
	if parent == "" || parent == id {
		return t.lock(id)
	}
	s, p := t.acquire(id), t.acquire(parent)
	order := []func(){s.mu.Lock, p.mu.RLock}
	if parent < id {
		slices.Reverse(order)
	}
	for _, lock := range order {
		lock()
	}
	return s, func() {
		s.mu.Unlock()
		p.mu.RUnlock()
		t.release(id, s)
		t.release(parent, p)
	}
}

// lockAll locks layers for writing, and returns their states in the order of ids.
func (t *layerTable) lockAll(ids []string) (states []*layerState, unlock func()) {
	byID := make(map[string]*layerState, len(ids))
	for _, id := range ids {
		if byID[id] == nil {
			byID[id] = t.acquire(id)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(byID)) {
		byID[id].mu.Lock()
	}
	for _, id := range ids {
		states = append(states, byID[id])
	}
	return states, func() {
		for id, s := range byID {
			s.mu.Unlock()
			t.release(id, s)
		}
	}
}

// ids lists the layers that somebody uses.
func (t *layerTable) ids() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Keys(t.states))
}
