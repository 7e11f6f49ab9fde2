package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// soakEnv says how long TestSoak works, soakSeedEnv repeats the random choices of a run, soakWorkersEnv is the number of its
// goroutines: one alone does the very same again, more of them as far as their order allows.
const (
	soakEnv        = "OVERLAY2_TEST_SOAK"
	soakSeedEnv    = "OVERLAY2_TEST_SEED"
	soakWorkersEnv = "OVERLAY2_TEST_WORKERS"
)

const (
	soakOwn   = 10      // layers of one worker
	soakDepth = 40      // layers of a chain
	soakHeap  = 1 << 19 // bytes that the heap may grow by, whatever the time
)

// TestSoak: goroutines make, fill, use, compare and remove layers over one another's, in one Driver, with a model of what each must hold. Several
// times they stop; then every layer is compared and removed, and nothing is left: no mount, descriptor, thread, goroutine, state or memory.
func TestSoak(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	total, seed, workers := soakOptions(t)
	home := overlaytest.MountFS(t, overlaytest.FS{Name: "ext4"})
	s := &soak{t: t, d: mustNew(t, home), seed: seed}
	length := min(max(total/10, 1500*time.Millisecond), time.Minute)
	rounds := max(2, int(total/length))
	t.Logf("%s=%d %s=%d: %d rounds of %v", soakSeedEnv, seed, soakWorkersEnv, workers, rounds, length)
	var first soakHeld
	for round := range rounds {
		s.work(round, workers, length)
		if t.Failed() {
			break
		}
		held := s.end()
		switch {
		case t.Failed():
		case round == 0:
			first = held
		default:
			held.compare(t, first)
		}
		t.Logf("round %d: %d calls, %v", round, s.calls.Load(), held)
		if t.Failed() {
			break
		}
	}
	must(t, s.d.Cleanup())
	if !t.Failed() {
		wantEmptyHome(t, s.d)
	}
}

func soakOptions(t *testing.T) (total time.Duration, seed uint64, workers int) {
	t.Helper()
	total, seed, workers = 3*time.Second, uint64(time.Now().UnixNano()), 8
	var err error
	if s := os.Getenv(soakEnv); s != "" {
		total, err = time.ParseDuration(s)
		must(t, err)
	}
	if s := os.Getenv(soakSeedEnv); s != "" {
		seed, err = strconv.ParseUint(s, 10, 64)
		must(t, err)
	}
	if s := os.Getenv(soakWorkersEnv); s != "" {
		workers, err = strconv.Atoi(s)
		must(t, err)
	}
	return total, seed, workers
}

// soak is what all goroutines share.
type soak struct {
	t     *testing.T
	d     *Driver
	seed  uint64
	calls atomic.Int64

	mu     sync.Mutex
	layers []*soakLayer // that anybody may use
}

// soakLayer is what is known of a layer.
type soakLayer struct {
	// mu is held for reading by who uses the layer, for writing by its owner when he changes or removes it.
	mu     sync.RWMutex
	id     string
	parent *soakLayer
	depth  int
	// Changed with mu held for writing:
	tree   map[string]string // what the layer and those below hold, see readSoakTree
	filled bool              // it has content of its own
	gone   bool
	story  []string // what was done to it
	// Protected by soak.mu:
	children  int
	committed bool // it has had children: it stays read-only
}

// told returns what was done to the layer and to those below it.
func (l *soakLayer) told() string {
	var b strings.Builder
	for ; l != nil; l = l.parent {
		fmt.Fprintf(&b, "\n%s: %s", l.id, strings.Join(l.story, "; "))
	}
	return b.String()
}

// parentID returns the ID of the layer's parent, "" for none.
func (l *soakLayer) parentID() string {
	if l.parent == nil {
		return ""
	}
	return l.parent.id
}

// work lets goroutines work for some time, or until one of them has come upon something.
func (s *soak) work(round, workers int, length time.Duration) {
	end := time.Now().Add(length)
	var wg sync.WaitGroup
	for n := range workers {
		w := &soakWorker{s: s, name: fmt.Sprintf("r%d-w%d-", round, n), r: rand.New(rand.NewPCG(s.seed, uint64(round*workers+n)))}
		wg.Go(func() {
			for time.Now().Before(end) && !s.t.Failed() {
				if err := w.step(); err != nil {
					s.t.Errorf("%v\nseed %d, the last calls of %s: %s", err, s.seed, w.name, strings.Join(w.trail, "; "))
				}
				s.calls.Add(1)
			}
		})
	}
	wg.Wait()
}

// end compares and removes all layers, and returns what the Driver holds then.
func (s *soak) end() soakHeld {
	s.t.Helper()
	checkEmpty(s.t, s.d)
	for len(s.layers) > 0 && !s.t.Failed() {
		s.layers = slices.DeleteFunc(s.layers, func(l *soakLayer) bool {
			if l.children > 0 {
				return false
			}
			path, err := s.d.Get(l.id, "")
			must(s.t, err)
			if err := sameSoakTree(path, l.tree); err != nil {
				s.t.Errorf("%s: %v%s", l.id, err, l.told())
			}
			must(s.t, errors.Join(s.d.Put(l.id), s.d.Remove(l.id)))
			if l.parent != nil {
				l.parent.children--
			}
			return true
		})
	}
	s.layers = nil
	must(s.t, s.d.Cleanup())
	checkEmpty(s.t, s.d)
	return takeSoakHeld(s.t, s.d)
}

// soakHeld is what must not grow.
type soakHeld struct {
	heap                 uint64 // bytes, after a collection
	descriptors, threads int
	mounts, states       int // of which there are none
}

func takeSoakHeld(t *testing.T, d *Driver) (h soakHeld) {
	t.Helper()
	var m runtime.MemStats
	for range 2 { // what has a finalizer is freed by the second
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	h.heap, h.descriptors, h.mounts = m.HeapAlloc, len(openFDs(t)), mountCount(t, d.home)
	threads, err := os.ReadDir("/proc/self/task")
	must(t, err)
	h.threads = len(threads)
	d.layers.mu.Lock()
	h.states = len(d.layers.states)
	d.layers.mu.Unlock()
	d.sizes.Range(func(any, any) bool { h.states++; return true })
	return h
}

func (h soakHeld) String() string {
	return fmt.Sprintf("%d KiB of heap, %d descriptors, %d threads", h.heap>>10, h.descriptors, h.threads)
}

// compare fails the test if there is more than there was.
func (h soakHeld) compare(t *testing.T, before soakHeld) {
	t.Helper()
	const spareThreads = 32 // the runtime keeps those that it once needed
	if h.heap > before.heap+soakHeap || h.descriptors > before.descriptors || h.threads > before.threads+spareThreads || h.mounts > 1 || h.states > 0 {
		t.Errorf("held: %v, %d mounts, %d states; after the first round: %v", h, h.mounts, h.states, before)
	}
}

// soakWorker is a goroutine, the owner of the layers that it makes.
type soakWorker struct {
	s     *soak
	name  string // begins the IDs of its layers
	r     *rand.Rand
	own   []*soakLayer
	made  int
	trail []string // its last calls
}

// note remembers a call.
func (w *soakWorker) note(format string, args ...any) {
	if len(w.trail) > 30 {
		w.trail = w.trail[1:]
	}
	w.trail = append(w.trail, fmt.Sprintf(format, args...))
}

// step does one thing.
func (w *soakWorker) step() error {
	n := w.r.IntN(100)
	switch {
	case len(w.own) < 2 || n < 18 && len(w.own) < soakOwn:
		return w.create()
	case n < 22 && len(w.own)+3 < soakOwn:
		return w.createChain()
	case n < 26 && len(w.own) < soakOwn:
		return w.clone()
	case n < 36:
		return w.change(w.apply)
	case n < 48:
		return w.change(w.write)
	case n < 52:
		return w.change(w.applyBroken)
	case n < 66:
		return w.change(w.remove)
	case n < 68:
		w.note("sync")
		return w.s.d.Sync()
	case n < 70:
		return w.check()
	case n < 71:
		return w.another()
	}
	l := w.pick()
	if l == nil {
		return nil
	}
	defer l.mu.RUnlock()
	read := []func(*soakLayer) error{w.get, w.view, w.diff, w.files, w.facts}[w.r.IntN(5)]
	if err := read(l); err != nil {
		return fmt.Errorf("%s: %w%s", l.id, err, l.told())
	}
	return nil
}

// pick returns a layer, of whomever, locked for reading; nil if it has just been removed.
func (w *soakWorker) pick() *soakLayer {
	w.s.mu.Lock()
	var l *soakLayer
	if n := len(w.s.layers); n > 0 {
		l = w.s.layers[w.r.IntN(n)]
	}
	w.s.mu.Unlock()
	if l == nil {
		return nil
	}
	l.mu.RLock()
	if l.gone {
		l.mu.RUnlock()
		return nil
	}
	return l
}

// pickParent is pick for a layer that is to get a child; nil is none, too.
func (w *soakWorker) pickParent() (l *soakLayer, unlock func()) {
	if w.r.IntN(6) > 0 {
		l = w.pick()
	}
	if l == nil {
		return nil, func() {}
	}
	if l.depth >= soakDepth {
		l.mu.RUnlock()
		return nil, func() {}
	}
	return l, l.mu.RUnlock
}

// add makes a layer known that is there now.
func (w *soakWorker) add(id string, parent *soakLayer, tree map[string]string, filled bool, story ...string) *soakLayer {
	l := &soakLayer{id: id, parent: parent, tree: tree, filled: filled, story: story}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	if parent != nil {
		parent.children++
		parent.committed = true
		l.depth = parent.depth + 1
	}
	w.own = append(w.own, l)
	w.s.layers = append(w.s.layers, l)
	return l
}

// forget is called when a layer is gone. Its lock is held.
func (w *soakWorker) forget(l *soakLayer) {
	l.gone = true
	is := func(other *soakLayer) bool { return other == l }
	w.own = slices.DeleteFunc(w.own, is)
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.layers = slices.DeleteFunc(w.s.layers, is)
	if l.parent != nil {
		l.parent.children--
	}
}

func (w *soakWorker) newID() string {
	w.made++
	return w.name + strconv.Itoa(w.made)
}

// create makes a layer, and fills one of two.
func (w *soakWorker) create() error {
	p, unlock := w.pickParent()
	defer unlock()
	id, parent, tree := w.newID(), "", map[string]string{}
	if p != nil {
		parent, tree = p.id, p.tree
	}
	create, kind := w.s.d.Create, "create"
	if w.r.IntN(2) == 0 {
		create, kind = w.s.d.CreateReadWrite, "createreadwrite"
	}
	w.note("%s %s on %s", kind, id, parent)
	if err := create(id, parent, nil); err != nil {
		return err
	}
	if err := create(id, parent, nil); !errors.Is(err, ErrLayerExists) {
		return fmt.Errorf("made twice: %w", err)
	}
	filled, story := w.r.IntN(2) == 0, []string{kind}
	if filled {
		data, result := soakTar(w.s.t, w.r, tree, false)
		story = append(story, "apply "+tarText(data))
		w.note("apply %s", id)
		if _, err := w.s.d.ApplyDiff(id, parent, bytes.NewReader(data)); err != nil {
			return err
		}
		tree = result
	}
	w.add(id, p, tree, filled, story...)
	return nil
}

// createChain makes some layers by ApplyLayers.
func (w *soakWorker) createChain() error {
	p, unlock := w.pickParent()
	defer unlock()
	parent, tree := "", map[string]string{}
	if p != nil {
		parent, tree = p.id, p.tree
	}
	var layers []LayerDiff
	var trees []map[string]string
	var stories []string
	for range 2 + w.r.IntN(2) {
		var data []byte
		data, tree = soakTar(w.s.t, w.r, tree, false)
		layers = append(layers, LayerDiff{ID: w.newID(), Diff: bytes.NewReader(data)})
		trees = append(trees, tree)
		stories = append(stories, "applylayers "+tarText(data))
	}
	w.note("applylayers %s... on %s", layers[0].ID, parent)
	if _, err := w.s.d.ApplyLayers(parent, layers); err != nil {
		return err
	}
	for i, l := range layers {
		p = w.add(l.ID, p, trees[i], true, stories[i])
	}
	return nil
}

// clone makes a layer from the diff of another.
func (w *soakWorker) clone() error {
	l := w.pick()
	if l == nil {
		return nil
	}
	defer l.mu.RUnlock()
	p := l.parent
	for range w.r.IntN(3) { // against one further down, which takes mounts
		if p != nil {
			p = p.parent
		}
	}
	id, parent := w.newID(), ""
	if p != nil {
		parent = p.id
	}
	w.note("clone %s as %s on %s", l.id, id, parent)
	if err := w.s.d.Create(id, parent, nil); err != nil {
		return err
	}
	r, err := w.s.d.Diff(l.id, parent)
	if err != nil {
		return err
	}
	_, err = w.s.d.ApplyDiff(id, parent, r)
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	w.add(id, p, l.tree, true, "clone of "+l.id)
	if err := w.verify(id, l.tree); err != nil {
		return fmt.Errorf("%w\nwhat was cloned: %w%s", err, w.verify(l.id, l.tree), l.told())
	}
	return nil
}

// verify gets a layer and compares it.
func (w *soakWorker) verify(id string, tree map[string]string) error {
	path, err := w.s.d.Get(id, "")
	if err != nil {
		return err
	}
	if err := errors.Join(sameSoakTree(path, tree), w.s.d.Put(id)); err != nil {
		return fmt.Errorf("%s: %w", id, err)
	}
	return nil
}

// change calls f with a layer of the worker's own that nobody else uses.
func (w *soakWorker) change(f func(l *soakLayer, parent bool) error) error {
	l := w.own[w.r.IntN(len(w.own))]
	l.mu.Lock()
	defer l.mu.Unlock()
	w.s.mu.Lock()
	parent := l.children > 0
	w.s.mu.Unlock()
	if err := f(l, parent); err != nil {
		return fmt.Errorf("%s: %w%s", l.id, err, l.told())
	}
	return nil
}

// apply fills a layer, or adds to it. One with children refuses that.
func (w *soakWorker) apply(l *soakLayer, parent bool) error {
	data, result := soakTar(w.s.t, w.r, l.tree, l.filled)
	w.note("apply %s", l.id)
	l.story = append(l.story, "apply "+tarText(data))
	_, err := w.s.d.ApplyDiff(l.id, l.parentID(), bytes.NewReader(data))
	if parent {
		return wantSoakErr(err, ErrLayerInUse)
	}
	if err != nil {
		return err
	}
	l.tree, l.filled = result, true
	return nil
}

// applyBroken applies half a tar, and then a whole one or removes the layer.
func (w *soakWorker) applyBroken(l *soakLayer, parent bool) error {
	if parent {
		return nil
	}
	data, _ := soakTar(w.s.t, w.r, l.tree, l.filled)
	if len(data) <= 1024 { // nothing but its end
		return nil
	}
	w.note("apply half a tar to %s", l.id)
	l.story = append(l.story, "apply half of "+tarText(data))
	// Cut within the last block. A whole block less is a whole tar, where that is the header of a symlink.
	if _, err := w.s.d.ApplyDiff(l.id, l.parentID(), bytes.NewReader(data[:len(data)-1024-w.r.IntN(511)-1])); err == nil {
		return errors.New("half a tar was taken")
	}
	_, err := w.s.d.Get(l.id, "")
	err = errors.Join(wantSoakErr(err, ErrIncomplete), wantSoakErr(w.s.d.Create(l.id+"-child", l.id, nil), ErrIncomplete))
	if err != nil {
		return err
	}
	if l.filled { // nobody knows what it holds
		return w.remove(l, false)
	}
	return w.apply(l, false)
}

// write changes a layer through its mount, got several times. One that has had children is read-only.
func (w *soakWorker) write(l *soakLayer, parent bool) error {
	times := 1 + w.r.IntN(3)
	w.note("write %s, got %d times", l.id, times)
	var path string
	for range times {
		var err error
		if path, err = w.s.d.Get(l.id, ""); err != nil {
			return err
		}
	}
	w.s.mu.Lock()
	readOnly := l.committed
	w.s.mu.Unlock()
	if readOnly {
		if err := os.WriteFile(filepath.Join(path, "must-not"), nil, 0o600); err == nil {
			return errors.New("a committed layer was written")
		}
	} else {
		result, did, err := soakWrite(w.r, path, l.tree)
		l.story = append(l.story, "write "+did)
		if err != nil {
			return err
		}
		l.tree, l.filled = result, true
	}
	err := errors.Join(sameSoakTree(path, l.tree), wantSoakErr(w.s.d.Remove(l.id), ErrLayerInUse))
	for range times {
		err = errors.Join(err, w.s.d.Put(l.id))
	}
	if parent { // somebody who compares its children may have got it
		return err
	}
	return errors.Join(err, wantSoakErr(w.s.d.Put(l.id), ErrNotMounted))
}

// remove removes a layer, which one with children refuses.
func (w *soakWorker) remove(l *soakLayer, parent bool) error {
	if l.parent != nil { // whose owner must not find that it has a child no more, and we not yet
		l.parent.mu.RLock()
		defer l.parent.mu.RUnlock()
	}
	w.note("remove %s", l.id)
	err := w.s.d.Remove(l.id)
	if parent {
		return wantSoakErr(err, ErrLayerInUse)
	}
	if err != nil {
		return err
	}
	w.forget(l)
	if w.s.d.Exists(l.id) {
		return errors.New("it is still there")
	}
	_, err = w.s.d.Get(l.id, "")
	return wantSoakErr(err, ErrLayerNotFound)
}

func wantSoakErr(err, want error) error {
	if !errors.Is(err, want) {
		return fmt.Errorf("got error %v, want %w", err, want) //nolint:errorlint // it may be nil
	}
	return nil
}
