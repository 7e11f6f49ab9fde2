package overlay2

import (
	"bytes"
	"context"
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
	"golang.org/x/sys/unix"
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
	// between are states in which a call that did not end well may leave it, beside those two.
	between []string
	// incomplete says that the call may leave the layer ErrIncomplete.
	incomplete bool
	// above says that the call makes a layer "new-above" over it, and fills both with treeOne and treeTwo.
	above bool
	// opens says that the call is New.
	opens bool
}

// aboveID is the layer over "new" of those steps that make one.
const aboveID = "new-above"

// The trees of "new".
const (
	treeTop = "top+" // what is below it
	treeOne = "top+one"
	treeTwo = "top+one+two"
	treeNew = "top+two"
	// treeBase is what Rebase makes of top+one.
	treeBase = "base+one"
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
		{name: "applylayers", run: func(d *Driver) error {
			_, err := d.ApplyLayers("top", []LayerDiff{{ID: "new", Diff: bytes.NewReader(one)}, {ID: aboveID, Diff: bytes.NewReader(two)}})
			return err
		}, before: stateAbsent, after: treeOne, between: []string{treeTop}, incomplete: true, above: true},
		{name: "apply-recorded", prepare: create, run: func(d *Driver) error {
			d.opts.RecordDigests = true
			return applyTar(one)(d)
		}, before: treeTop, after: treeOne, incomplete: true},
		{name: "record", prepare: createOne, run: func(d *Driver) error { return d.RecordDigests(context.Background(), "new") }, before: treeOne, after: treeOne},
		{name: "get", prepare: createBox, run: get, before: treeTop, after: treeTop},
		{name: "get-again", prepare: createBox, begin: func(t *testing.T, d *Driver) { // the layers below are ready then
			for range 2 {
				must(t, errors.Join(get(d), d.Put("new")))
			}
		}, run: get, before: treeTop, after: treeTop},
		{name: "get-kept", prepare: createBox, begin: func(t *testing.T, d *Driver) { getPut(t, d, "new", 5) }, // it is kept where the filesystem has times of birth
			run: get, before: treeTop, after: treeTop},
		{name: "put-kept", prepare: createBox, begin: func(t *testing.T, d *Driver) { getPut(t, d, "new", 5); must(t, get(d)) },
			run: func(d *Driver) error { return d.Put("new") }, before: treeTop, after: treeTop},
		{name: "put", prepare: createBox, begin: func(t *testing.T, d *Driver) { must(t, get(d)) },
			run: func(d *Driver) error { return d.Put("new") }, before: treeTop, after: treeTop},
		{name: "rebase", prepare: createOne, run: func(d *Driver) error { return d.Rebase("new", "base") }, before: treeOne, after: treeBase},
		{name: "rebase-unsynced", begin: createOne, run: func(d *Driver) error { return d.Rebase("new", "base") }, before: treeOne, after: treeBase},
		{name: "diff", prepare: createOne, run: func(d *Driver) error { return readAll(d, "new", "top") }, before: treeOne, after: treeOne},
		{name: "diff-merged", prepare: createOne, run: func(d *Driver) error { return readAll(d, "new", "") }, before: treeOne, after: treeOne},
		{name: "remove", prepare: createOne, run: remove, before: treeOne, after: stateAbsent},
		{name: "remove-strict", mode: DurabilityStrict, prepare: createOne, run: remove, before: treeOne, after: stateAbsent},
		{name: "sync", begin: createOne, run: (*Driver).Sync, before: treeOne, after: treeOne},
		{name: "cleanup", begin: createBox, run: (*Driver).Cleanup, before: treeTop, after: treeTop},
		{name: "new-adopt", prepare: func(t *testing.T, d *Driver) { createOne(t, d); abandon(d) }, opens: true, before: treeOne, after: treeOne},
		{name: "new-recover", prepare: func(t *testing.T, d *Driver) { createOne(t, d); loseNew(t, d) }, opens: true,
			before: stateIncomplete, after: stateIncomplete, incomplete: true},
		{name: "recover", begin: func(t *testing.T, d *Driver) { createOne(t, d); loseNew(t, d) }, run: recoverAgain,
			before: stateIncomplete, after: stateIncomplete, incomplete: true},
		{name: "recover-reused", begin: func(t *testing.T, d *Driver) { loseReused(t, d, one) }, run: recoverAgain, before: treeOne, after: treeOne},
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

// recoverAgain does what New does with what a crash has left, and nothing else of it.
func recoverAgain(d *Driver) error {
	if err := d.recoverHome(); err != nil {
		return fmt.Errorf("recover %s: %w", d.home, err)
	}
	return nil
}

// loseReused makes the home look as if power had been cut before a layer "new" was on the disk that had been removed meanwhile, but
// for its link, and made again. The second one is on the disk.
func loseReused(t *testing.T, d *Driver, one []byte) {
	apply(t, d, "new", "top", one)
	link, err := os.ReadFile(filepath.Join(d.home, "new", linkName))
	must(t, err)
	must(t, d.Remove("new"))
	d.trash.wait()
	abandon(d)
	failUnsynced(t, d)
	apply(t, d, "new", "top", one)
	must(t, d.flush(false))
	must(t, os.Symlink(linkTarget("new"), filepath.Join(d.home, linkDir, string(link))))
}

// loseNew makes the home look as if power had been cut before "new" was on the disk, with a layer half made
// and one half removed.
func loseNew(t *testing.T, d *Driver) {
	abandon(d)
	failUnsynced(t, d)
	staging := filepath.Join(d.home, stagingDir)
	must(t, os.Truncate(filepath.Join(d.home, "new", linkName), 0))
	must(t, os.Truncate(filepath.Join(d.home, "new", lowerName), 0))
	for _, name := range []string{newPrefix + "X", trashPrefix + "X"} {
		must(t, os.MkdirAll(filepath.Join(staging, name, diffName, "a"), 0o700))
		must(t, os.WriteFile(filepath.Join(staging, name, diffName, "a", "b"), []byte("b"), 0o600))
	}
}

// failUnsynced makes what is recorded as not on the disk look as if it had never come there.
func failUnsynced(t *testing.T, d *Driver) {
	staging := filepath.Join(d.home, stagingDir)
	entries, err := os.ReadDir(staging)
	must(t, err)
	for _, e := range entries {
		if rest, ok := strings.CutPrefix(e.Name(), unsyncedPrefix+d.instance); ok {
			must(t, os.Rename(filepath.Join(staging, e.Name()), filepath.Join(staging, unsyncedPrefix+failedInstance+rest)))
		}
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
	apply(t, d, "new", "base", one)
	s.trees[treeBase] = tree(t, d, "new", overlaytest.NoRoot)
	must(t, d.Remove("new"))
	must(t, d.Cleanup())
	return s
}

// state says in which state a layer is, "new" or the one above it.
func (s *stepTest) state(t *testing.T, d *Driver, id string) string {
	t.Helper()
	if !d.Exists(id) {
		return stateAbsent
	}
	path, err := d.Get(id, "")
	if errors.Is(err, ErrIncomplete) {
		return stateIncomplete
	}
	if err != nil {
		return err.Error()
	}
	got := overlaytest.Tree(t, path, overlaytest.NoOverlayXattrs, overlaytest.NoRoot) // whose time no diff has
	putAll(t, d, id)
	for _, name := range []string{treeTop, treeOne, treeTwo, treeNew, treeBase} {
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
		if (p.ID == "new" || step.above && p.ID == aboveID) && (step.incomplete && errors.Is(p.Err, ErrIncomplete) || strings.HasSuffix(p.Path, "/"+mergedName)) {
			continue
		}
		t.Errorf("check: %v", p)
	}
	state = s.state(t, d, "new")
	// Digests that are there are whole, and true of what is there.
	err = d.Verify(t.Context(), "new", func(diff Difference) { t.Errorf("verify: %v", diff) })
	if err != nil && !errors.Is(err, ErrNoDigests) && !errors.Is(err, ErrIncomplete) && !errors.Is(err, ErrLayerNotFound) {
		t.Errorf("verify: %v", err)
	}
	if step.above {
		s.removeAbove(t, d, state)
	}
	ok := state == stateIncomplete && step.incomplete
	for _, a := range allowed {
		ok = ok || a == state
	}
	if !ok {
		t.Errorf("layer is %s, want one of %q", state, allowed)
	}
	return state
}

// removeAbove removes the layer above "new", which must not be whole over one that is not.
func (s *stepTest) removeAbove(t *testing.T, d *Driver, state string) {
	t.Helper()
	switch above := s.state(t, d, aboveID); {
	case above == stateAbsent || above == stateIncomplete || above == treeTop && state == treeTop:
	case above == treeTwo && state == treeOne:
	default:
		t.Errorf("the layer above one that is %s is %s", state, above)
	}
	must(t, d.Remove(aboveID))
	d.trash.wait()
}

// checkError reports an error that does not say what has failed, and where.
func (s *stepTest) checkError(t *testing.T, err error, errno unix.Errno, what string) {
	t.Helper()
	if !errors.Is(err, errno) {
		t.Errorf("%s: the errno is lost", what)
	}
	for _, wrong := range []error{ErrCorrupt, ErrLayerNotFound, ErrNotSupported, ErrIncompatibleFS} {
		if errors.Is(err, wrong) {
			t.Errorf("%s: that is said of what is in order: %v", what, wrong)
		}
	}
	var le *LayerError
	if !errors.As(err, &le) && !strings.Contains(err.Error(), s.home) {
		t.Errorf("%s: names neither layer nor home", what)
	}
}

// finish shows that the layer can be filled, if it is incomplete, and removed, and that the home is in order then.
func (s *stepTest) finish(t *testing.T, d *Driver, step step, state string) {
	t.Helper()
	if state == stateIncomplete {
		must(t, errOf(d.ApplyDiff("new", "top", bytes.NewReader(twoTar(t)))))
		if got := s.state(t, d, "new"); got != treeNew && (got != treeTwo || step.before != treeOne) {
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
