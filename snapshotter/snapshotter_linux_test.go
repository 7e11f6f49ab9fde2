package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// openTest opens a root and, at the end of the test, makes sure that layers and records are in order.
func openTest(t testing.TB, root string, opts Options) *Snapshotter {
	t.Helper()
	overlaytest.Require(t, "root")
	if opts.Log == nil {
		opts.Log = testLog(t)
	}
	s, err := New(root, opts)
	must(t, err)
	t.Cleanup(func() {
		if s.lock == nil {
			return
		}
		checkOrder(t, s)
		must(t, s.Close())
	})
	return s
}

// checkOrder fails the test unless the layers are in order and just those that are recorded, over the recorded parents.
func checkOrder(t testing.TB, s *Snapshotter) {
	t.Helper()
	ctx := context.Background()
	problems, err := s.driver.Check()
	must(t, err)
	for _, p := range problems {
		t.Errorf("check: %v", p)
	}
	want := map[string]string{}
	must(t, s.tx(ctx, false, func(ctx context.Context) error {
		records, err := s.records(ctx)
		if errdefs.IsNotFound(err) {
			return nil
		}
		for _, r := range records {
			if !hasLayer(r.Kind, r.parent != nil) {
				continue
			}
			want[r.id] = emptyLayer
			if r.parent != nil {
				want[r.id] = r.parent.id
			}
		}
		return err
	}))
	numbers, err := s.layers()
	must(t, err)
	have := map[string]string{}
	for _, n := range numbers {
		id := fmt.Sprint(n)
		have[id], err = s.parentOf(id)
		must(t, err)
	}
	if !maps.Equal(want, have) {
		t.Errorf("layers and what they are over: %v, recorded are %v", have, want)
	}
}

// list returns the snapshots as "name kind parent".
func list(t testing.TB, s snapshots.Snapshotter) string {
	t.Helper()
	var lines []string
	must(t, s.Walk(context.Background(), func(_ context.Context, info snapshots.Info) error {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %v %s", info.Name, info.Kind, info.Parent)))
		return nil
	}))
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// write mounts an active snapshot and calls f with the path.
func write(t testing.TB, mounts []mount.Mount, f func(dir string)) {
	t.Helper()
	mounts = slices.Clone(mounts)
	for i := range mounts {
		mounts[i].Options = slices.Clone(mounts[i].Options) // mounting with an id map changes them
	}
	must(t, mount.WithTempMount(context.Background(), mounts, func(dir string) error {
		f(dir)
		return nil
	}))
}

// commit makes a committed snapshot with one file.
func commit(t testing.TB, s snapshots.Snapshotter, name, parent string, opts ...snapshots.Opt) {
	t.Helper()
	ctx := context.Background()
	mounts, err := s.Prepare(ctx, name+"-active", parent)
	must(t, err)
	write(t, mounts, func(dir string) { must(t, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644)) })
	must(t, s.Commit(ctx, name, name+"-active", opts...))
}

// names returns what a snapshot shows in its root directory.
func names(t testing.TB, mounts []mount.Mount) string {
	t.Helper()
	var list []string
	write(t, mounts, func(dir string) {
		entries, err := os.ReadDir(dir)
		must(t, err)
		for _, e := range entries {
			list = append(list, e.Name())
		}
	})
	return strings.Join(list, " ")
}

// TestMounts: the forms that containerd's own tools look into.
func TestMounts(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	s := openTest(t, root, Options{})
	path := func(id, name string) string { return filepath.Join(root, layersName, id, name) }
	get := func(kind, key, parent string, labels map[string]string) mount.Mount {
		t.Helper()
		f := s.Prepare
		if kind == "view" {
			f = s.View
		}
		m, err := f(ctx, key, parent, snapshots.WithLabels(labels))
		must(t, err)
		again, err := s.Mounts(ctx, key)
		must(t, err)
		if fmt.Sprint(m) != fmt.Sprint(again) || len(m) != 1 {
			t.Errorf("mounts are %v, and then %v", m, again)
		}
		return m[0]
	}
	want := func(m mount.Mount, typ, source string, options ...string) {
		t.Helper()
		if m.Type != typ || m.Source != source || len(m.Options) < len(options) || !slices.Equal(m.Options[:len(options)], options) {
			t.Errorf("mount is %+v, want %s of %s with %q", m, typ, source, options)
		}
	}
	want(get("prepare", "a1", "", nil), "bind", path("1", "diff"), "rw", "rbind")
	must(t, s.Commit(ctx, "c1", "a1"))
	want(get("view", "v1", "c1", nil), "bind", path("1", "diff"), "ro", "rbind")
	want(get("prepare", "a3", "c1", nil), "overlay", "overlay",
		"workdir="+path("3", "work"), "upperdir="+path("3", "diff"), "lowerdir="+path("1", "diff"))
	must(t, s.Commit(ctx, "c3", "a3"))
	want(get("view", "v4", "c3", nil), "overlay", "overlay", "lowerdir="+path("3", "diff")+":"+path("1", "diff"))
	want(get("view", "v5", "", nil), "bind", path("5", "diff"), "ro", "rbind")
	// One that is going to get its parent must be written as an overlay: a bind mount would keep no whiteouts.
	want(get("prepare", "a6", "", map[string]string{labelParentChainID: "sha256:x"}), "overlay", "overlay",
		"workdir="+path("6", "work"), "upperdir="+path("6", "diff"), "lowerdir="+path(emptyLayer, "diff"))
	if _, err := s.Mounts(ctx, "c1"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("mounts of a committed snapshot: %v", err)
	}
	if _, err := s.Mounts(ctx, "none"); !errdefs.IsNotFound(err) {
		t.Errorf("mounts of no snapshot: %v", err)
	}
}

// TestMountsMeanwhile: what is asked for while the snapshot's layer is removed or put over another, before others see the record of that, is
// answered as it is recorded then.
func TestMountsMeanwhile(t *testing.T) {
	for name, c := range map[string]struct {
		change func(ctx context.Context, s *Snapshotter, id string) error
		check  func(error) bool
	}{
		"removed": {func(ctx context.Context, s *Snapshotter, id string) error {
			_, _, err := storage.Remove(ctx, "a")
			return errors.Join(err, s.driver.Remove(id))
		}, errdefs.IsNotFound},
		"removed and made anew": {func(ctx context.Context, s *Snapshotter, id string) error {
			_, _, err := storage.Remove(ctx, "a")
			made, err2 := storage.CreateSnapshot(ctx, snapshots.KindActive, "a", "base")
			return errors.Join(err, err2, s.driver.Remove(id), s.createLayer(snapshot{Snapshot: made}))
		}, func(err error) bool { return err == nil }},
		"committed over a parent": {func(ctx context.Context, s *Snapshotter, id string) error {
			_, err := storage.CommitActive(ctx, "a", "c", snapshots.Usage{}, snapshots.WithParent("base"))
			return errors.Join(err, s.driver.Rebase(id, "1"))
		}, errdefs.IsNotFound},
		"lost": {func(_ context.Context, s *Snapshotter, id string) error {
			return s.driver.Remove(id)
		}, errdefs.IsDataLoss},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			s := openTest(t, t.TempDir(), Options{})
			commit(t, s, "base", "")
			_, err := s.Prepare(ctx, "a", "")
			must(t, err)
			got := make(chan error, 1)
			must(t, s.tx(ctx, true, func(ctx context.Context) error {
				err := c.change(ctx, s, "2")
				go func() {
					_, err := s.Mounts(context.Background(), "a")
					got <- err
				}()
				select {
				case err := <-got: // it did not wait for the record
					got <- err
				case <-time.After(200 * time.Millisecond):
				}
				return err
			}))
			if err := <-got; !c.check(err) {
				t.Errorf("mounts: %v", err)
			}
			if name == "lost" {
				must(t, s.Remove(ctx, "a"))
			}
		})
	}
}

// TestRebase: layers of an image are filled at the same time and get their parents when they are committed, as containerd 2
// unpacks. A file that an upper layer deletes is gone.
func TestRebase(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	s := openTest(t, root, Options{})
	commit(t, s, "base", "")
	later := snapshots.WithLabels(map[string]string{labelParentChainID: "base"})
	for _, key := range []string{"mid-active", "top-active"} {
		mounts, err := s.Prepare(ctx, key, "", later)
		must(t, err)
		// What containerd's applier does: into the upper directory, whiteouts as overlayfs has them.
		upper := option(t, mounts[0], "upperdir=")
		must(t, os.WriteFile(filepath.Join(upper, key), nil, 0o644))
		if key == "top-active" {
			whiteout(t, filepath.Join(upper, "base"))
		}
	}
	if err := s.Commit(ctx, "x", "top-active", snapshots.WithParent("mid-active")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("active parent: %v", err)
	}
	if err := s.Commit(ctx, "x", "top-active", snapshots.WithParent("none")); !errdefs.IsNotFound(err) {
		t.Errorf("no such parent: %v", err)
	}
	if err := s.Commit(ctx, "x", "top-active", snapshots.WithParent("x")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("over itself: %v", err)
	}
	checkOrder(t, s)
	must(t, s.Commit(ctx, "mid", "mid-active", snapshots.WithParent("base")))
	must(t, s.Commit(ctx, "top", "top-active", snapshots.WithParent("mid")))
	commit(t, s, "last", "top", snapshots.WithParent("top")) // the parent that it has
	mounts, err := s.View(ctx, "view", "last")
	must(t, err)
	if got := names(t, mounts); got != "last mid-active top-active" {
		t.Errorf("the image holds %q", got)
	}
	_, err = s.Prepare(ctx, "other", "mid")
	must(t, err)
	if err := s.Commit(ctx, "x", "other", snapshots.WithParent("base")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("another parent: %v", err)
	}
	want := "base Committed\nlast Committed top\nmid Committed base\nother Active mid\ntop Committed mid\nview View last"
	if got := list(t, s); got != want {
		t.Errorf("snapshots:\n%s", got)
	}
	must(t, s.Close())
	checkOrder(t, openTest(t, root, Options{}))
}

// TestRebaseFails: a layer that a Commit could not put over its parent stays over the one it has, and another Commit that comes
// before the first has ended is not undone with it.
func TestRebaseFails(t *testing.T) {
	ctx := context.Background()
	log := &atLog{Handler: slog.DiscardHandler, message: "snapshotter error"} // said at the end of a transaction that failed
	s := openTest(t, t.TempDir(), Options{Log: slog.New(log)})
	commit(t, s, "base", "")
	for _, again := range []bool{false, true} {
		mounts, err := s.Prepare(ctx, "a", "", snapshots.WithLabels(map[string]string{labelParentChainID: "base"}))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(option(t, mounts[0], "upperdir="), "f"), nil, 0o644))
		id := idOf(t, s, "a")
		_, err = s.driver.Get(id, "")
		must(t, err)
		if again {
			log.f = func() {
				must(t, s.driver.Put(id))
				must(t, s.Commit(ctx, "c", "a", snapshots.WithParent("base")))
			}
		}
		if err := s.Commit(ctx, "c", "a", snapshots.WithParent("base")); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("commit of a layer in use: %v", err)
		}
		if !again {
			must(t, s.driver.Put(id))
			checkOrder(t, s)
			must(t, s.Remove(ctx, "a"))
		}
	}
	mounts, err := s.View(ctx, "v", "c")
	must(t, err)
	if got := names(t, mounts); got != "base f" {
		t.Errorf("the image holds %q", got)
	}
}

// TestLabels: unknown ones are kept and inherited by nobody; what cannot be is refused by the label's name.
func TestLabels(t *testing.T) {
	ctx := context.Background()
	s := openTest(t, t.TempDir(), Options{})
	labels := map[string]string{"containerd.io/gc.root": "now", "containerd.io/snapshot/unknown": "kept", "mine": ""}
	_, err := s.Prepare(ctx, "a", "", snapshots.WithLabels(labels))
	must(t, err)
	info, err := s.Stat(ctx, "a")
	must(t, err)
	if info.Labels["containerd.io/snapshot/unknown"] != "kept" || info.Labels["containerd.io/gc.root"] != "now" {
		t.Errorf("labels are %v", info.Labels)
	}
	for _, bad := range []map[string]string{
		{snapshots.LabelSnapshotUIDMapping: "0:1000:1"},
		{snapshots.LabelSnapshotGIDMapping: "0:1000:1"},
		{snapshots.LabelSnapshotUIDMapping: "0:1000", snapshots.LabelSnapshotGIDMapping: "0:1000:1"},
		{snapshots.LabelSnapshotUIDMapping: "0:-1:1", snapshots.LabelSnapshotGIDMapping: "0:1000:1"},
		{snapshots.LabelSnapshotUIDMapping: "0:4294967295:1", snapshots.LabelSnapshotGIDMapping: "0:1000:1"},
		{snapshots.LabelSnapshotUIDMapping: "1:1000:1", snapshots.LabelSnapshotGIDMapping: "0:1000:1"}, // no root
		{snapshots.LabelSnapshotUIDMapping: "0:1000:10,5:2000:9", snapshots.LabelSnapshotGIDMapping: "0:1000:1"},
		{snapshots.LabelSnapshotMaxSize: "10G"},
		{snapshots.LabelSnapshotMaxSize: "0"},
		{snapshots.LabelSnapshotMaxSize: "-1"},
		{LabelMaxInodes: "many"},
	} {
		_, err := s.Prepare(ctx, "b", "", snapshots.WithLabels(bad))
		named := err != nil && slices.ContainsFunc(slices.Collect(maps.Keys(bad)), func(l string) bool { return strings.Contains(err.Error(), l) })
		if !errdefs.IsInvalidArgument(err) || !named {
			t.Errorf("%v: %v", bad, err)
		}
	}
	if got := list(t, s); got != "a Active" {
		t.Errorf("snapshots: %s", got)
	}
	ids := map[string]string{snapshots.LabelSnapshotUIDMapping: "0:1000:9", snapshots.LabelSnapshotGIDMapping: "0:1000:9"}
	if _, err := s.Update(ctx, snapshots.Info{Name: "a", Labels: ids}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("an id map for what is there: %v", err)
	}
}

// TestLimitsRefused: where the filesystem cannot hold a limit, a snapshot that asks for one is not made, and the error says what
// is missing. (What limits do where there are quotas is tested with the driver.)
func TestLimitsRefused(t *testing.T) {
	ctx := context.Background()
	s := openTest(t, t.TempDir(), Options{})
	if slices.Contains(s.driver.Status(), [2]string{"Project Quota", "true"}) {
		return // TestLimits is for that
	}
	for _, label := range []string{snapshots.LabelSnapshotMaxSize, LabelMaxInodes} {
		_, err := s.Prepare(ctx, "a", "", snapshots.WithLabels(map[string]string{label: "1048576"}))
		if !errdefs.IsFailedPrecondition(err) || !errors.Is(err, overlay2.ErrNotSupported) || !strings.Contains(err.Error(), "quota") {
			t.Errorf("%s: %v", label, err)
		}
	}
	_, err := s.Prepare(ctx, "a", "")
	must(t, err)
	label := map[string]string{snapshots.LabelSnapshotMaxSize: "1048576"}
	if _, err := s.Update(ctx, snapshots.Info{Name: "a", Labels: label}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("update: %v", err)
	}
	info, err := s.Stat(ctx, "a")
	must(t, err)
	if len(info.Labels) > 0 {
		t.Errorf("the label of a limit that does not hold: %v", info.Labels)
	}
	// A view cannot be written, so there is nothing to limit.
	_, err = s.View(ctx, "v", "", snapshots.WithLabels(label))
	must(t, err)
}

// TestLimits: a limit holds, can be changed and lifted. Written through an overlay, that is: ext4 lets root pass every limit of a
// plain directory, which is what a snapshot without a parent is.
func TestLimits(t *testing.T) {
	dirs := map[string]string{"here": t.TempDir()}
	if dir := os.Getenv("OVERLAY2_TEST_DIR_XFS"); dir != "" { // in a guest, where the other is on ext4
		dirs["xfs"] = must1(os.MkdirTemp(dir, "limits-"))
	}
	for name, dir := range dirs {
		t.Run(name, func(t *testing.T) {
			s := openTest(t, dir, Options{})
			if !slices.Contains(s.driver.Status(), [2]string{"Project Quota", "true"}) {
				if os.Getenv("OVERLAY2_TEST_DIR_XFS") != "" {
					t.Error("no quota in a guest")
				}
				return // TestLimitsRefused is for that
			}
			testLimits(t, s)
		})
	}
}

func testLimits(t *testing.T, s *Snapshotter) {
	ctx := context.Background()
	commit(t, s, "base", "")
	limit := func(n int) map[string]string { return map[string]string{snapshots.LabelSnapshotMaxSize: fmt.Sprint(n)} }
	mounts, err := s.Prepare(ctx, "a", "base", snapshots.WithLabels(limit(4<<20)))
	must(t, err)
	write(t, mounts, func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "big"), make([]byte, 8<<20), 0o644); err == nil {
			t.Error("8 MiB into 4")
		}
		_, err := s.Update(ctx, snapshots.Info{Name: "a", Labels: limit(16 << 20)})
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "big"), make([]byte, 8<<20), 0o644))
	})
	u, err := s.Usage(ctx, "a")
	if err != nil || u.Size < 8<<20 || u.Size > 9<<20 {
		t.Errorf("usage %+v, %v", u, err)
	}
	// Without the label there is no limit.
	_, err = s.Update(ctx, snapshots.Info{Name: "a"})
	must(t, err)
	write(t, must1(s.Mounts(ctx, "a")), func(dir string) {
		must(t, os.WriteFile(filepath.Join(dir, "bigger"), make([]byte, 16<<20), 0o644))
	})
	must(t, s.Remove(ctx, "a"))
}

// TestUsage: blocks and inodes of the snapshot's own files, and those of a committed one as they were.
func TestUsage(t *testing.T) {
	ctx := context.Background()
	s := openTest(t, t.TempDir(), Options{})
	commit(t, s, "base", "")
	mounts, err := s.Prepare(ctx, "a", "base")
	must(t, err)
	before, err := s.Usage(ctx, "a")
	must(t, err)
	write(t, mounts, func(dir string) { must(t, os.WriteFile(filepath.Join(dir, "f"), make([]byte, 1<<20), 0o644)) })
	after, err := s.Usage(ctx, "a")
	must(t, err)
	if after.Inodes != before.Inodes+1 || after.Size < before.Size+1<<20 || after.Size > before.Size+1<<20+65536 {
		t.Errorf("usage was %+v and is %+v", before, after)
	}
	must(t, s.Commit(ctx, "c", "a"))
	if u, err := s.Usage(ctx, "c"); err != nil || u != after {
		t.Errorf("usage of the committed is %+v, %v, not %+v", u, err, after)
	}
	_, err = s.View(ctx, "v", "c")
	must(t, err)
	if u, err := s.Usage(ctx, "v"); err != nil || u != (snapshots.Usage{}) {
		t.Errorf("usage of a view is %+v, %v", u, err)
	}
}

// TestUsageMeanwhile: a snapshot that is removed while its files are counted is not there; only one that is still recorded has
// lost its layer.
func TestUsageMeanwhile(t *testing.T) {
	ctx := context.Background()
	s := openTest(t, t.TempDir(), Options{})
	prepare := func() {
		mounts, err := s.Prepare(ctx, "a", "")
		must(t, err)
		must(t, os.WriteFile(filepath.Join(mounts[0].Source, "x"), nil, 0o600))
	}
	remove := func() { must(t, s.Remove(ctx, "a")) }
	for name, f := range map[string]func(){"removed": remove, "removed and made anew": func() { remove(); prepare() }} {
		prepare()
		if u, err := s.Usage(during(f), "a"); !errdefs.IsNotFound(err) || errdefs.IsDataLoss(err) {
			t.Errorf("%s: %+v, %v", name, u, err)
		}
		_ = s.Remove(ctx, "a")
	}
	prepare()
	if u, err := s.Usage(during(func() { must(t, s.driver.Remove(idOf(t, s, "a"))) }), "a"); !errdefs.IsDataLoss(err) {
		t.Errorf("layer taken away: %+v, %v", u, err)
	}
	must(t, s.Remove(ctx, "a"))
}

// TestUsageFilesMeanwhile: files and directories that a container deletes while they are counted are not counted, and are no
// error; nor do they keep the snapshot from being committed.
func TestUsageFilesMeanwhile(t *testing.T) {
	s := openTest(t, t.TempDir(), Options{})
	mounts, err := s.Prepare(context.Background(), "a", "")
	must(t, err)
	dir := mounts[0].Source
	var kept snapshots.Usage
	count := func(ctx context.Context) {
		t.Helper()
		u, err := s.Usage(ctx, "a")
		must(t, err)
		if kept == (snapshots.Usage{}) {
			kept = u
		}
		if u != kept {
			t.Errorf("usage is %+v, not %+v", u, kept)
		}
	}
	must(t, os.WriteFile(filepath.Join(dir, "kept"), make([]byte, 1<<20), 0o644))
	must(t, os.Link(filepath.Join(dir, "kept"), filepath.Join(dir, "link")))
	count(context.Background())
	fill := func() {
		must(t, os.Mkdir(filepath.Join(dir, "dir"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "dir", "file"), nil, 0o644))
		must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o644))
	}
	empty := func() {
		must(t, os.RemoveAll(filepath.Join(dir, "dir")))
		must(t, os.Remove(filepath.Join(dir, "file")))
	}
	fill()
	count(during(empty))
	fill()
	must(t, s.Commit(during(empty), "c", "a"))
	if u, err := s.Usage(context.Background(), "c"); err != nil || u != kept {
		t.Errorf("usage of the committed is %+v, %v", u, err)
	}
}

// TestCommitMeanwhile: what is committed is the snapshot whose files were counted and synced, not another that got its key meanwhile.
func TestCommitMeanwhile(t *testing.T) {
	ctx := context.Background()
	s := openTest(t, t.TempDir(), Options{})
	_, err := s.Prepare(ctx, "a", "")
	must(t, err)
	anew := func() {
		must(t, s.Remove(ctx, "a"))
		_, err := s.Prepare(ctx, "a", "")
		must(t, err)
	}
	if err := s.Commit(during(anew), "c", "a"); !errdefs.IsNotFound(err) {
		t.Errorf("made anew: %v", err)
	}
	if got := list(t, s); got != "a Active" {
		t.Errorf("snapshots:\n%s", got)
	}
	must(t, s.Commit(ctx, "c", "a"))
}

// TestCanceled: a call whose caller has gone while it waited for others changes nothing.
func TestCanceled(t *testing.T) {
	s := openTest(t, t.TempDir(), Options{})
	commit(t, s, "base", "")
	_, err := s.Prepare(context.Background(), "a", "base")
	must(t, err)
	must(t, s.driver.CreateReadWrite(after(t, s), emptyLayer, nil))
	before := list(t, s)
	for name, call := range map[string]func(ctx context.Context) error{
		"prepare": func(ctx context.Context) error { _, err := s.Prepare(ctx, "b", "base"); return err },
		"view":    func(ctx context.Context) error { _, err := s.View(ctx, "v", "base"); return err },
		"update":  func(ctx context.Context) error { _, err := s.Update(ctx, snapshots.Info{Name: "a"}); return err },
		"commit":  func(ctx context.Context) error { return s.Commit(ctx, "c", "a") },
		"remove":  func(ctx context.Context) error { return s.Remove(ctx, "a") },
		"cleanup": s.Cleanup,
	} {
		ctx, cancel := context.WithCancel(context.Background())
		got := make(chan error, 1)
		must(t, s.tx(context.Background(), true, func(context.Context) error {
			go func() { got <- call(ctx) }()
			time.Sleep(50 * time.Millisecond) // it waits, or has not begun
			cancel()
			return nil
		}))
		if err := <-got; !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := list(t, s); got != before {
		t.Errorf("snapshots were\n%s\nand are\n%s", before, got)
	}
	must(t, s.Cleanup(context.Background()))
}

// TestTooManyLayers: a chain that containerd cannot mount is refused before anything is built on it, and just below that it mounts.
func TestTooManyLayers(t *testing.T) {
	ctx := context.Background()
	s := openTest(t, t.TempDir(), Options{Durability: overlay2.DurabilityOff})
	parent := ""
	for i := 1; ; i++ {
		key, name := fmt.Sprintf("a%d", i), fmt.Sprintf("c%d", i)
		mounts, err := s.Prepare(ctx, key, parent)
		if errdefs.IsFailedPrecondition(err) && i > 200 {
			t.Logf("%d layers below: %v", i-1, err)
			break
		}
		must(t, err)
		if i > 200 && i%20 == 0 {
			names(t, mounts)
		}
		must(t, s.Commit(ctx, name, key))
		parent = name
	}
	mounts, err := s.View(ctx, "v", parent) // shorter by the upper and work directories
	must(t, err)
	names(t, mounts)
}

// TestSecondInstance: a root belongs to one process.
func TestSecondInstance(t *testing.T) {
	root := t.TempDir()
	s := openTest(t, root, Options{})
	if _, err := New(root, Options{}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("twice: %v", err)
	}
	must(t, s.Close())
	openTest(t, root, Options{})
}

// TestRootOfFilesystem: the top of a fresh ext4, which has lost+found, is an empty root. A file of that name is somebody's.
func TestRootOfFilesystem(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	must(t, os.Mkdir(filepath.Join(root, "lost+found"), 0o700))
	s := openTest(t, root, Options{})
	_, err := s.Prepare(ctx, "a", "")
	must(t, err)
	must(t, s.Close())
	openTest(t, root, Options{})
	other := t.TempDir()
	must(t, os.WriteFile(filepath.Join(other, "lost+found"), nil, 0o600))
	if _, err := New(other, Options{Log: testLog(t)}); !errors.Is(err, ErrFormat) {
		t.Errorf("a file: %v", err)
	}
}

// TestBadRoot: what New does not open, and leaves as it is.
func TestBadRoot(t *testing.T) {
	overlaytest.Require(t, "root")
	ctx := context.Background()
	for name, c := range map[string]struct {
		damage func(t *testing.T, root string)
		want   error
		text   string
	}{
		"newer format":  {func(t *testing.T, root string) { must(t, os.WriteFile(root+"/format", []byte("2\n"), 0o600)) }, ErrFormat, `"2\n"`},
		"no format":     {func(t *testing.T, root string) { must(t, os.Remove(root+"/format")) }, ErrFormat, "not a root"},
		"store is gone": {func(t *testing.T, root string) { must(t, os.Remove(root+"/metadata.db")) }, ErrCorrupt, "2 layers"},
		"store is empty": {func(t *testing.T, root string) {
			must(t, os.Truncate(root+"/metadata.db", 0))
		}, ErrCorrupt, "2 layers"},
		"store is cut off": {func(t *testing.T, root string) {
			must(t, os.Truncate(root+"/metadata.db", 4*4096))
		}, ErrCorrupt, "metadata.db"},
		"store is garbage": {func(t *testing.T, root string) {
			overwrite(t, root+"/metadata.db", 0, -1)
		}, ErrCorrupt, "metadata.db"},
		"pages are garbage": {func(t *testing.T, root string) {
			overwrite(t, root+"/metadata.db", 2*4096, -1)
		}, ErrCorrupt, "metadata.db"},
		"layers are gone": {func(t *testing.T, root string) { must(t, os.RemoveAll(root+"/layers")) }, ErrCorrupt, "is their disk mounted"},
		"store of before": {func(t *testing.T, root string) {
			for _, id := range []string{"7", "9"} {
				must(t, os.Rename(root+"/layers/"+map[string]string{"7": "1", "9": "2"}[id], root+"/layers/"+id))
			}
		}, ErrCorrupt, "older than the layers"},
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			s, err := New(root, Options{Log: testLog(t)})
			must(t, err)
			commit(t, s, "base", "")
			_, err = s.Prepare(ctx, "box", "base")
			must(t, err)
			must(t, s.Close())
			c.damage(t, root)
			before := files(t, root)
			if _, err := New(root, Options{Log: testLog(t)}); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), root) {
				t.Errorf("new: %v", err)
			} else {
				t.Log(err)
			}
			if after := files(t, root); after != before {
				t.Errorf("the root was\n%s\nand is\n%s", before, after)
			}
		})
	}
	for _, opts := range []Options{{MountOptions: []string{"volatile"}}, {MountOptions: []string{"upperdir=/x"}}, {Durability: 9}} {
		if _, err := New(filepath.Join(t.TempDir(), "x"), opts); !errors.Is(err, overlay2.ErrInvalidOption) {
			t.Errorf("%+v: %v", opts, err)
		}
	}
	if _, err := New(filepath.Join(t.TempDir(), "a:b"), Options{}); !errors.Is(err, overlay2.ErrInvalidOption) {
		t.Errorf("colon: %v", err)
	}
}

// TestReconcile: what a process that was killed, or a power cut, leaves is mended when the root is opened.
func TestReconcile(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	s := openTest(t, root, Options{})
	commit(t, s, "base", "")
	commit(t, s, "mid", "base")
	for key, parent := range map[string]string{"kept": "mid", "lost": "mid", "lost-base": ""} {
		_, err := s.Prepare(ctx, key, parent)
		must(t, err)
	}
	_, err := s.Prepare(ctx, "half-rebased", "")
	must(t, err)
	_, err = s.Prepare(ctx, "not-rebased-active", "")
	must(t, err)
	must(t, s.Commit(ctx, "not-rebased", "not-rebased-active", snapshots.WithParent("mid")))
	id := func(key string) string { return idOf(t, s, key) }
	must(t, s.driver.Remove(id("lost")))
	must(t, s.driver.Remove(id("lost-base")))
	must(t, s.driver.Rebase(id("half-rebased"), id("base")))
	must(t, s.driver.Rebase(id("not-rebased"), emptyLayer))
	// As a killed Remove leaves a chain, and a killed Prepare the next number.
	_, err = s.Prepare(ctx, "removed", "mid")
	must(t, err)
	must(t, s.Commit(ctx, "removed-parent", "removed"))
	_, err = s.Prepare(ctx, "removed-child", "removed-parent")
	must(t, err)
	must(t, s.tx(ctx, true, func(ctx context.Context) error {
		for _, key := range []string{"removed-child", "removed-parent"} {
			if _, _, err := storage.Remove(ctx, key); err != nil {
				return err
			}
		}
		return nil
	}))
	must(t, s.driver.CreateReadWrite(after(t, s), id("mid"), nil))
	if _, err := s.Mounts(ctx, "lost"); !errdefs.IsDataLoss(err) {
		t.Errorf("mounts of a lost layer: %v", err)
	}
	if _, err := s.Mounts(ctx, "half-rebased"); !errdefs.IsDataLoss(err) {
		t.Errorf("mounts of a layer over another parent: %v", err)
	}
	must(t, s.Close())
	var log strings.Builder
	s = openTest(t, root, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	want := "base Committed\nhalf-rebased Active\nkept Active mid\nmid Committed base\nnot-rebased Committed mid"
	if got := list(t, s); got != want {
		t.Errorf("snapshots:\n%s", got)
	}
	for text, n := range map[string]int{"has lost its layer": 2, "over its recorded parent again": 2, "without a snapshot is removed": 3} {
		if got := strings.Count(log.String(), text); got != n {
			t.Errorf("%q is logged %d times, not %d:\n%s", text, got, n, log.String())
		}
	}
	_, err = s.Prepare(ctx, "lost", "mid")
	must(t, err)
}

// TestOrphanInTheWay: the number of a Prepare that did not end well is used again, and what it left is gone.
func TestOrphanInTheWay(t *testing.T) {
	ctx := context.Background()
	s := openTest(t, t.TempDir(), Options{})
	commit(t, s, "base", "")
	next := after(t, s)
	must(t, s.driver.CreateReadWrite(next, emptyLayer, nil))
	must(t, os.WriteFile(filepath.Join(s.diffPath(next), "old"), nil, 0o644))
	mounts, err := s.Prepare(ctx, "a", "base")
	must(t, err)
	if got := names(t, mounts); got != "base" {
		t.Errorf("the new snapshot shows %q", got)
	}
	// Cleanup takes what a failed Remove left.
	must(t, s.driver.CreateReadWrite(after(t, s), emptyLayer, nil))
	must(t, s.Cleanup(ctx))
	checkOrder(t, s)
}

// TestCommittedLayerLost: a layer that others are over is never forgotten, nor are they.
func TestCommittedLayerLost(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	quiet := slog.New(slog.DiscardHandler)
	s, err := New(root, Options{Log: quiet})
	must(t, err)
	commit(t, s, "base", "")
	commit(t, s, "top", "base")
	must(t, s.Close())
	must(t, os.RemoveAll(filepath.Join(root, layersName, "1")))
	s, err = New(root, Options{Log: quiet})
	must(t, err)
	if got := list(t, s); got != "base Committed\ntop Committed base" {
		t.Errorf("snapshots:\n%s", got)
	}
	if _, err := s.View(ctx, "v", "top"); !errdefs.IsDataLoss(err) {
		t.Errorf("view: %v", err)
	}
	if _, err := s.Prepare(ctx, "v", "top"); !errdefs.IsDataLoss(err) {
		t.Errorf("prepare: %v", err)
	}
	must(t, s.Remove(ctx, "top"))
	must(t, s.Remove(ctx, "base"))
	must(t, s.Close())
}

// TestLayerElsewhere: a layer that somebody has put on another disk, with a link to it, is refused, but neither forgotten nor
// removed, and the rest works. When it is no more recorded it stays too, and keeps nothing else from being removed.
func TestLayerElsewhere(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	opts := Options{Log: slog.New(slog.DiscardHandler)}
	s := openTest(t, root, opts)
	commit(t, s, "base", "")
	commit(t, s, "top", "base")
	before := list(t, s)
	must(t, s.Close())
	layer, moved := filepath.Join(root, layersName, "2"), filepath.Join(t.TempDir(), "2")
	move := func() {
		must(t, os.Rename(layer, moved))
		must(t, os.Symlink(moved, layer))
	}
	moveBack := func() {
		must(t, os.Remove(layer))
		must(t, os.Rename(moved, layer))
	}
	move()
	s = openTest(t, root, opts)
	if got := list(t, s); got != before {
		t.Errorf("snapshots:\n%s", got)
	}
	if _, err := s.View(ctx, "v", "top"); !errdefs.IsDataLoss(err) {
		t.Errorf("view: %v", err)
	}
	_, err := s.View(ctx, "v", "base")
	must(t, err)
	must(t, s.Close())
	moveBack()
	s = openTest(t, root, opts)
	mounts, err := s.View(ctx, "w", "top")
	must(t, err)
	if got := names(t, mounts); got != "base top" {
		t.Errorf("the image holds %q", got)
	}
	move()
	must(t, s.Remove(ctx, "w"))
	must(t, s.Remove(ctx, "top"))
	must(t, s.driver.CreateReadWrite(after(t, s), emptyLayer, nil))
	must(t, s.Cleanup(ctx))
	if numbers, err := s.layers(); err != nil || !slices.Equal(numbers, []uint64{1, 2}) {
		t.Errorf("layers %v, %v", numbers, err)
	}
	must(t, s.Close())
	s = openTest(t, root, opts)
	moveBack()
	must(t, s.Cleanup(ctx))
}
