package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/sirupsen/logrus"
)

// What a call may leave of a layer, beside a tree.
const (
	stateAbsent     = "absent"
	stateIncomplete = "incomplete"
)

// step is a call that tests interrupt at each system call, or let one of them fail. It is about the
// layer "new", in a home that setupSteps has made.
type step struct {
	name string
	mode Durability
	// prepare is called before, by a Driver that has ended when run is called.
	prepare func(t *testing.T, d *Driver)
	// begin is called by the Driver that makes the call, just before it.
	begin func(t *testing.T, d *Driver)
	run   func(d *Driver) error
	// before and after are the states of "new" when the call has not begun and when it has ended.
	before, after string
	// incomplete says that the call may leave the layer ErrIncomplete.
	incomplete bool
	// opens says that the call is New.
	opens bool
}

// The trees of "new".
const (
	treeTop = "top+" // what is below it
	treeOne = "top+one"
	treeTwo = "top+one+two"
	treeNew = "top+two"
)

func oneTar(t testing.TB) []byte {
	return makeTar(t, file("one/", ""), file("one/big", strings.Repeat("1", 70_000)), file("one/a", "a"), file("top/.wh.gone", ""))
}

func twoTar(t testing.TB) []byte {
	return makeTar(t, file("two/", ""), file("two/b", "b"), file("name", "two"))
}

// steps returns all calls.
func steps(t *testing.T) []step {
	one, two := oneTar(t), twoTar(t)
	create := func(t *testing.T, d *Driver) { must(t, d.Create("new", "top", nil)) }
	createBox := func(t *testing.T, d *Driver) { must(t, d.CreateReadWrite("new", "top", nil)) }
	createOne := func(t *testing.T, d *Driver) { apply(t, d, "new", "top", one) }
	broken := func(t *testing.T, d *Driver) {
		must(t, d.Create("new", "top", nil))
		if _, err := d.ApplyDiff("new", "top", bytes.NewReader(one[:5000])); err == nil {
			t.Fatal("half a tar was taken")
		}
	}
	get := func(d *Driver) error { return errOf2(d.Get("new", "")) }
	applyTar := func(data []byte) func(d *Driver) error {
		return func(d *Driver) error { return errOf(d.ApplyDiff("new", "top", bytes.NewReader(data))) }
	}
	remove := func(d *Driver) error {
		err := d.Remove("new")
		d.trash.wait()
		return err
	}
	return []step{
		{name: "create", run: func(d *Driver) error { return d.Create("new", "top", nil) }, before: stateAbsent, after: treeTop},
		{name: "create-strict", mode: DurabilityStrict, run: func(d *Driver) error { return d.Create("new", "top", nil) }, before: stateAbsent, after: treeTop},
		{name: "createreadwrite", run: func(d *Driver) error { return d.CreateReadWrite("new", "top", nil) }, before: stateAbsent, after: treeTop},
		{name: "apply", prepare: create, run: applyTar(one), before: treeTop, after: treeOne, incomplete: true},
		{name: "apply-unsynced", begin: create, run: applyTar(one), before: treeTop, after: treeOne, incomplete: true},
		{name: "apply-strict", mode: DurabilityStrict, prepare: create, run: applyTar(one), before: treeTop, after: treeOne, incomplete: true},
		{name: "apply-again", prepare: createOne, run: applyTar(two), before: treeOne, after: treeTwo, incomplete: true},
		{name: "apply-incomplete", prepare: broken, run: applyTar(two), before: stateIncomplete, after: treeNew, incomplete: true},
		{name: "get", prepare: createBox, run: get, before: treeTop, after: treeTop},
		{name: "put", prepare: createBox, begin: func(t *testing.T, d *Driver) { must(t, get(d)) },
			run: func(d *Driver) error { return d.Put("new") }, before: treeTop, after: treeTop},
		{name: "diff", prepare: createOne, run: func(d *Driver) error { return readAll(d, "new", "top") }, before: treeOne, after: treeOne},
		{name: "diff-merged", prepare: createOne, run: func(d *Driver) error { return readAll(d, "new", "") }, before: treeOne, after: treeOne},
		{name: "remove", prepare: createOne, run: remove, before: treeOne, after: stateAbsent},
		{name: "remove-strict", mode: DurabilityStrict, prepare: createOne, run: remove, before: treeOne, after: stateAbsent},
		{name: "sync", begin: createOne, run: (*Driver).Sync, before: treeOne, after: treeOne},
		{name: "cleanup", begin: createBox, run: (*Driver).Cleanup, before: treeTop, after: treeTop},
		{name: "new-adopt", prepare: func(t *testing.T, d *Driver) { createOne(t, d); abandon(d) }, opens: true, before: treeOne, after: treeOne},
		{name: "new-recover", prepare: func(t *testing.T, d *Driver) { createOne(t, d); loseNew(t, d) }, opens: true,
			before: stateIncomplete, after: stateIncomplete, incomplete: true},
	}
}

func errOf2(_ string, err error) error { return err }

// readAll reads a diff to its end.
func readAll(d *Driver, id, parent string) error {
	r, err := d.Diff(id, parent)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return errors.Join(err, r.Close())
}

// abandon makes the records of a Driver look like those of a dead process.
func abandon(d *Driver) {
	d.syncer.mu.Lock()
	defer d.syncer.mu.Unlock()
	if d.syncer.timer != nil {
		d.syncer.timer.Stop()
		d.syncer.timer = nil
	}
	if b := d.syncer.batch; b != nil {
		_ = sys.Close(b.fd)
	}
	d.syncer.batch = nil
}

// loseNew makes the home look as if power had been cut before "new" was on the disk, with a layer half made
// and one half removed.
func loseNew(t *testing.T, d *Driver) {
	abandon(d)
	staging := filepath.Join(d.home, stagingDir)
	entries, err := os.ReadDir(staging)
	must(t, err)
	for _, e := range entries {
		if rest, ok := strings.CutPrefix(e.Name(), unsyncedPrefix+d.instance); ok {
			must(t, os.Rename(filepath.Join(staging, e.Name()), filepath.Join(staging, unsyncedPrefix+failedInstance+rest)))
		}
	}
	must(t, os.Truncate(filepath.Join(d.home, "new", linkName), 0))
	must(t, os.Truncate(filepath.Join(d.home, "new", lowerName), 0))
	for _, name := range []string{newPrefix + "X", trashPrefix + "X"} {
		must(t, os.MkdirAll(filepath.Join(staging, name, diffName, "a"), 0o700))
		must(t, os.WriteFile(filepath.Join(staging, name, diffName, "a", "b"), []byte("b"), 0o600))
	}
}

// quietOptions are those of a Driver whose log is not looked at.
func quietOptions(mode Durability) Options {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return Options{Durability: mode, Log: logrus.NewEntry(log)}
}

// stepTest is a home with layers that must not change, and what they hold.
type stepTest struct {
	home  string
	trees map[string]string // by layer, and by the names of trees of "new"
}

// setupSteps makes a home, or what is missing in one that "new" was removed from.
func setupSteps(t *testing.T, home string) *stepTest {
	t.Helper()
	d, err := New(home, quietOptions(DurabilityBackground))
	must(t, err)
	s := &stepTest{home: d.home, trees: map[string]string{}}
	apply(t, d, "base", "", makeTar(t, file("base", "base"), file("top/", ""), file("top/gone", "g")))
	apply(t, d, "top", "base", makeTar(t, file("name", "top")))
	apply(t, d, "sibling", "top", makeTar(t, file("sibling", "s")))
	must(t, d.CreateReadWrite("box", "top", nil))
	fill(t, d, "box", `file written "w"`)
	for _, id := range []string{"base", "top", "sibling", "box"} {
		s.trees[id] = tree(t, d, id)
	}
	one, two := oneTar(t), twoTar(t)
	for name, tars := range map[string][][]byte{treeTop: {}, treeOne: {one}, treeTwo: {one, two}, treeNew: {two}} {
		must(t, d.Create("new", "top", nil))
		for _, data := range tars {
			must(t, errOf(d.ApplyDiff("new", "top", bytes.NewReader(data))))
		}
		s.trees[name] = tree(t, d, "new", overlaytest.NoRoot)
		must(t, d.Remove("new"))
	}
	must(t, d.Cleanup())
	return s
}

// state says in which state "new" is.
func (s *stepTest) state(t *testing.T, d *Driver) string {
	t.Helper()
	if !d.Exists("new") {
		return stateAbsent
	}
	path, err := d.Get("new", "")
	if errors.Is(err, ErrIncomplete) {
		return stateIncomplete
	}
	if err != nil {
		return err.Error()
	}
	got := overlaytest.Tree(t, path, overlaytest.NoOverlayXattrs, overlaytest.NoRoot) // whose time no diff has
	putAll(t, d, "new")
	for _, name := range []string{treeTop, treeOne, treeTwo, treeNew} {
		if got == s.trees[name] {
			return name
		}
	}
	return got
}

// putAll gives back all uses of a layer, those of a dead process too.
func putAll(t *testing.T, d *Driver, id string) {
	t.Helper()
	err := d.Put(id)
	for err == nil {
		err = d.Put(id)
	}
	if !errors.Is(err, ErrNotMounted) {
		t.Errorf("put %s: %v", id, err)
	}
}

// verifyOthers reports layers that are not as they were.
func (s *stepTest) verifyOthers(t *testing.T, d *Driver) {
	t.Helper()
	for _, id := range []string{"base", "top", "sibling", "box"} {
		if got := tree(t, d, id); got != s.trees[id] {
			t.Errorf("layer %s is now\n%s", id, got)
		}
	}
}

// verifyAfter looks at the home after a call that may not have ended well.
func (s *stepTest) verifyAfter(t *testing.T, d *Driver, step step, allowed ...string) (state string) {
	t.Helper()
	problems, err := d.Check()
	must(t, err)
	for _, p := range problems {
		if p.ID == "new" && (step.incomplete && errors.Is(p.Err, ErrIncomplete) || strings.HasSuffix(p.Path, "/"+mergedName)) {
			continue
		}
		t.Errorf("check: %v", p)
	}
	state = s.state(t, d)
	ok := state == stateIncomplete && step.incomplete
	for _, a := range allowed {
		ok = ok || a == state
	}
	if !ok {
		t.Errorf("layer is %s, want one of %q", state, allowed)
	}
	return state
}

// finish shows that the layer can be filled, if it is incomplete, and removed, and that the home is in order then.
func (s *stepTest) finish(t *testing.T, d *Driver, step step, state string) {
	t.Helper()
	if state == stateIncomplete {
		must(t, errOf(d.ApplyDiff("new", "top", bytes.NewReader(twoTar(t)))))
		if got := s.state(t, d); got != treeNew && (got != treeTwo || step.before != treeOne) {
			t.Errorf("filled again the layer is %s", got)
		}
	}
	must(t, d.Remove("new"))
	d.trash.wait()
	checkEmpty(t, d)
	wantLinks(t, d, 4)
}

// stagingNames lists the staging directory.
func stagingNames(t *testing.T, d *Driver) string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(d.home, stagingDir))
	must(t, err)
	return fmt.Sprint(entries)
}
