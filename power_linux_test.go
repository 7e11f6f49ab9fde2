package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/sirupsen/logrus"
)

// cutsEnv is the number of power cuts of each test.
const cutsEnv = "OVERLAY2_TEST_CUTS"

// cuts returns how often to cut the power.
func cuts(t *testing.T, usual int) int {
	s := os.Getenv(cutsEnv)
	if s == "" {
		return usual
	}
	n, err := strconv.Atoi(s)
	must(t, err)
	return n
}

// TestPowerCut: whenever power is cut, every layer is whole, absent or ErrIncomplete, and
// what was synced, or in strict mode what had returned, is whole.
func TestPowerCut(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		for _, mode := range []Durability{DurabilityBackground, DurabilityStrict} {
			t.Run(fs+"/"+mode.String(), func(t *testing.T) {
				var sum powerCount
				p := newPowerTest(t, fs, mode)
				usual := cuts(t, 25)
				for i := 0; i < usual || i < 8*usual && !sum.telling(mode); i++ {
					if i >= usual { // a slow machine, such as a guest, gets to its first sync later
						p.longest = 8 * shortRound
					}
					bad, count := p.round(t)
					for _, s := range bad {
						t.Error(s)
					}
					if t.Failed() {
						return
					}
					sum.add(count)
				}
				t.Logf("%+v", sum)
				if !sum.telling(mode) {
					t.Error("the cuts came at no interesting moment")
				}
			})
		}
	}
}

// TestPowerCutUnsafe: the same test finds the loss where nothing is synced or recorded.
func TestPowerCutUnsafe(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			p := newPowerTest(t, fs, DurabilityOff)
			for i := range 60 {
				if bad, _ := p.round(t); len(bad) > 0 {
					t.Logf("cut %d: %s", i+1, strings.Join(bad, "\n"))
					return
				}
			}
			t.Error("no loss seen: the test proves nothing")
		})
	}
}

// powerCount counts the layers that were found after cuts.
type powerCount struct{ Whole, Absent, Incomplete, Synced int }

func (c *powerCount) add(o powerCount) {
	c.Whole += o.Whole
	c.Absent += o.Absent
	c.Incomplete += o.Incomplete
	c.Synced += o.Synced
}

// telling reports whether there were layers of each kind that the mode can leave.
func (c powerCount) telling(mode Durability) bool {
	return c.Whole > 0 && c.Synced > 0 && (mode != DurabilityBackground || c.Incomplete > 0)
}

// shortRound is the longest time to a cut at first.
const shortRound = 120 * time.Millisecond

// powerTest works on a home until power is cut, and looks at what is left.
type powerTest struct {
	t     *testing.T
	power *overlaytest.Power
	home  string
	mode  Durability
	log   *logrus.Entry
	n     int // rounds
	// longest bounds the time to a cut.
	longest time.Duration
}

func newPowerTest(t *testing.T, fs string, mode Durability) *powerTest {
	overlaytest.Require(t, "root", "overlay")
	p := &powerTest{t: t, power: overlaytest.NewPower(t, fs), mode: mode, longest: shortRound}
	p.log = quietLog()
	p.home = filepath.Join(p.power.Dir, "home")
	d := p.open(t)
	must(t, d.Sync())
	must(t, d.Cleanup())
	return p
}

func quietLog() *logrus.Entry {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return logrus.NewEntry(log)
}

func (p *powerTest) open(t *testing.T) *Driver {
	t.Helper()
	d, err := New(p.home, Options{Durability: p.mode, Log: p.log})
	must(t, err)
	return d
}

// powerLayer is what is known of a layer: which calls have begun and returned.
type powerLayer struct {
	id, parent                        string
	readWrite                         bool
	created, applied, applying        bool
	removing                          bool
	syncedCreate, syncedApply, onDisk bool // onDisk: something else was synced since it was created
}

// powerModel is what is known of a home. Nothing is noted any more after the cut.
type powerModel struct {
	mu     sync.Mutex
	cut    bool
	layers []*powerLayer
	busy   map[string]int // layers that are used as a parent right now
	// tell, if set, is called with each change of what is known of a layer; told is what it was called with.
	tell func(string)
	told map[string]string
}

// note calls f unless power was cut.
func (m *powerModel) note(f func()) (on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.cut {
		f()
		m.tellChanges()
	}
	return !m.cut
}

// round works for some milliseconds, cuts the power, and returns what is wrong then.
func (p *powerTest) round(t *testing.T) (bad []string, count powerCount) {
	t.Helper()
	d := p.open(t)
	p.n++
	m := &powerModel{busy: map[string]int{}}
	var wg sync.WaitGroup
	for worker := range 3 {
		wg.Go(func() {
			for i := 0; m.note(func() {}); i++ {
				if err := p.step(d, m, fmt.Sprintf("r%d-%d-%d", p.n, worker, i)); err != nil && m.note(func() {}) {
					t.Error(err)
					return
				}
			}
		})
	}
	time.Sleep(rand.N(p.longest))
	m.mu.Lock()
	m.cut = true
	p.power.Cut(t)
	m.mu.Unlock()
	wg.Wait()
	_ = d.Cleanup() // the machine is dead: what it returns is lost too
	p.power.Restore(t)
	d = p.open(t)
	bad, count = p.verify(d, m)
	if len(bad) == 0 {
		p.removeAll(t, d, m)
	} else {
		must(t, d.Cleanup())
		must(t, os.RemoveAll(p.home))
	}
	return bad, count
}

// step makes, fills or removes a layer, or syncs.
func (p *powerTest) step(d *Driver, m *powerModel, id string) error {
	switch rand.IntN(12) {
	case 0:
		return p.sync(d, m)
	case 1, 2:
		return p.ledger(m)
	case 3:
		return p.remove(d, m)
	}
	l := &powerLayer{id: id, readWrite: rand.IntN(4) == 0}
	m.note(func() {
		if n := len(m.layers); n > 0 && rand.IntN(4) > 0 {
			if q := m.layers[rand.IntN(n)]; (q.applied || q.created && q.readWrite) && !q.removing {
				l.parent = q.id
				m.busy[q.id]++
			}
		}
		m.layers = append(m.layers, l)
	})
	create := d.Create
	if l.readWrite {
		create = d.CreateReadWrite
	}
	err := create(id, l.parent, nil)
	m.note(func() { m.busy[l.parent]-- })
	if err != nil {
		return err
	}
	fill := !l.readWrite && rand.IntN(5) > 0
	// At once: in between another worker would take it for one that may be removed.
	m.note(func() { l.created, l.applying, l.syncedCreate = true, fill, p.mode == DurabilityStrict })
	if !fill {
		return nil
	}
	if _, err := d.ApplyDiff(id, l.parent, p.tar(id)); err != nil {
		return err
	}
	m.note(func() { l.applied, l.syncedApply = true, p.mode == DurabilityStrict })
	return nil
}

// sync makes all that is known safe: by the call, or as the background does.
func (p *powerTest) sync(d *Driver, m *powerModel) error {
	var created, applied []*powerLayer
	m.note(func() {
		for _, l := range m.layers {
			if l.created {
				created = append(created, l)
			}
			if l.applied {
				applied = append(applied, l)
			}
		}
	})
	sync := d.Sync
	if rand.IntN(2) == 0 && p.mode != DurabilityOff {
		sync = func() error { return d.flush(false) }
	}
	if err := sync(); err != nil {
		return err
	}
	m.note(func() {
		for _, l := range created {
			l.syncedCreate = true
		}
		for _, l := range applied {
			l.syncedApply = true
		}
	})
	return nil
}

// ledger does what brings the filesystem's log to the disk and no data of layers: it is
// what leaves files without content.
func (p *powerTest) ledger(m *powerModel) error {
	var created []*powerLayer
	m.note(func() {
		for _, l := range m.layers {
			if l.created {
				created = append(created, l)
			}
		}
	})
	f, err := os.OpenFile(filepath.Join(p.power.Dir, "ledger"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString("x")
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	m.note(func() {
		for _, l := range created {
			l.onDisk = true
		}
	})
	return nil
}

// remove removes a layer without children, if the first that it tries is one.
func (p *powerTest) remove(d *Driver, m *powerModel) error {
	var l *powerLayer
	m.note(func() {
		if len(m.layers) == 0 {
			return
		}
		l = m.layers[rand.IntN(len(m.layers))]
		if !l.created || l.applying && !l.applied || l.removing || m.busy[l.id] > 0 ||
			slices.ContainsFunc(m.layers, func(c *powerLayer) bool { return c.parent == l.id && !c.removing }) {
			l = nil
			return
		}
		l.removing = true
	})
	if l == nil {
		return nil
	}
	err := d.Remove(l.id)
	if errors.Is(err, ErrLayerInUse) { // a child that is being removed
		m.note(func() { l.removing = false })
		return nil
	}
	return err
}

// tar returns the content of a layer.
func (p *powerTest) tar(id string) *bytes.Reader {
	return bytes.NewReader(makeTar(p.t, file("dir/", ""), file("dir/small", id), file("big", strings.Repeat(id+"\n", 3000)), file("f", strings.Repeat(id, 10))))
}

// verify returns what is not as it must be after a cut.
func (p *powerTest) verify(d *Driver, m *powerModel) (bad []string, count powerCount) {
	fail := func(l *powerLayer, format string, args ...any) {
		bad = append(bad, fmt.Sprintf("round %d: %+v: ", p.n, *l)+fmt.Sprintf(format, args...))
	}
	problems, err := d.Check()
	if err != nil {
		bad = append(bad, err.Error())
	}
	for _, problem := range problems {
		if !errors.Is(problem.Err, ErrIncomplete) {
			bad = append(bad, problem.String())
		}
	}
	for _, l := range m.layers {
		if l.removing {
			continue
		}
		if l.syncedApply {
			count.Synced++
		}
		if !d.Exists(l.id) {
			count.Absent++
			if l.syncedCreate || l.onDisk {
				fail(l, "lost")
			}
			continue
		}
		switch err := p.verifyLayer(d, l); {
		case err == nil:
			count.Whole++
		case errors.Is(err, ErrIncomplete):
			count.Incomplete++
			if l.syncedApply || l.syncedCreate && !l.applying {
				fail(l, "%v", err)
			}
		default:
			fail(l, "%v", err)
		}
	}
	return bad, count
}

// verifyLayer returns an error unless the layer can be used and is right.
func (p *powerTest) verifyLayer(d *Driver, l *powerLayer) error {
	if _, err := d.Get(l.id, ""); err != nil {
		return err
	}
	if err := d.Put(l.id); err != nil {
		return err
	}
	meta, err := d.GetMetadata(l.id)
	if err != nil {
		return err
	}
	lower, _, _ := strings.Cut(meta["LowerDir"], ":")
	if want := filepath.Join(p.home, l.parent, "diff"); l.parent != "" && lower != want || l.parent == "" && lower != "" {
		return fmt.Errorf("parent is %q", lower)
	}
	diff := filepath.Join(p.home, l.id, "diff")
	entries, err := os.ReadDir(diff)
	if err != nil {
		return err
	}
	if len(entries) == 0 && !l.applied {
		return nil
	}
	for name, want := range map[string]string{"dir/small": l.id, "big": strings.Repeat(l.id+"\n", 3000), "f": strings.Repeat(l.id, 10)} {
		if data, err := os.ReadFile(filepath.Join(diff, name)); err != nil || string(data) != want {
			return fmt.Errorf("%s has %d bytes, wants %d: %w", name, len(data), len(want), err)
		}
	}
	return nil
}

// removeAll fills the incomplete layers again, which makes all above them usable, and removes everything.
func (p *powerTest) removeAll(t *testing.T, d *Driver, m *powerModel) {
	t.Helper()
	for _, l := range m.layers {
		if !l.removing && !l.readWrite && d.Exists(l.id) {
			_, err := d.Get(l.id, "")
			if err == nil {
				must(t, d.Put(l.id))
				continue
			}
			_, err = d.ApplyDiff(l.id, l.parent, p.tar(l.id))
			must(t, err)
			l.applied = true
		}
	}
	for _, l := range slices.Backward(m.layers) {
		if d.Exists(l.id) && !l.removing {
			must(t, p.verifyLayer(d, l))
		}
	}
	for _, l := range slices.Backward(m.layers) {
		must(t, d.Remove(l.id))
	}
	must(t, d.Cleanup())
	wantEmptyHome(t, d)
}
