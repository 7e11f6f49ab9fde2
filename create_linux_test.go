package overlay2

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// TestLayerOnDisk: the format is Docker's.
func TestLayerOnDisk(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		d := newTestDriver(t, dir, Options{})
		must(t, d.Create("base", "", nil))
		must(t, d.Create("mid", "base", nil))
		must(t, d.CreateReadWrite("top", "mid", nil))
		read := func(name string) string {
			data, err := os.ReadFile(filepath.Join(dir, name))
			must(t, err)
			return string(data)
		}
		base, mid, top := read("base/link"), read("mid/link"), read("top/link")
		if got, want := read("top/lower"), "l/"+mid+":l/"+base; got != want {
			t.Errorf("lower %q, want %q", got, want)
		}
		for link, id := range map[string]string{base: "base", mid: "mid", top: "top"} {
			if target, err := os.Readlink(filepath.Join(dir, "l", link)); err != nil || target != "../"+id+"/diff" {
				t.Errorf("l/%s leads to %q %v", link, target, err)
			}
		}
		want := strings.TrimSpace(`
"." dir 0710 0:0
"children" dir 0700 0:0
"children/` + mid + `.mid" symlink 0777 0:0 -> "-"
"committed" file 0600 0:0 size=0
"diff" dir 0755 0:0
"link" file 0644 0:0 size=26
"listed" symlink 0777 0:0 -> SEAL`)
		seal, err := os.Readlink(dir + "/base/listed")
		must(t, err)
		if got := strings.ReplaceAll(layout(t, dir+"/base"), strconv.Quote(seal), "SEAL"); got != want {
			t.Errorf("base:\n%s\nwant:\n%s", got, want)
		}
		diff, err := sys.StatDir(unix.AT_FDCWD, dir+"/top/diff")
		must(t, err)
		want = strings.TrimSpace(`
"." dir 0710 0:0
"diff" dir 0755 0:0
"link" file 0644 0:0 size=26
"listed" symlink 0777 0:0 -> ` + strconv.Quote(d.seal(childless(diff.Ident))) + `
"lower" file 0644 0:0 size=57
"work" dir 0700 0:0`)
		if got := layout(t, dir+"/top"); got != want {
			t.Errorf("top:\n%s\nwant:\n%s", got, want)
		}
	})
}

// layout lists a directory with modes and owners.
func layout(t *testing.T, dir string) string {
	t.Helper()
	var lines []string
	for line := range strings.Lines(overlaytest.Tree(t, dir, overlaytest.NoTimes|overlaytest.NoXattrs)) {
		words := strings.Fields(line)
		for i, w := range words {
			if strings.HasPrefix(w, "sha256=") {
				words = append(words[:i], words[i+1:]...)
				break
			}
		}
		lines = append(lines, strings.Join(words, " "))
	}
	return strings.Join(lines, "\n")
}

// TestUmask: the process's umask has no say in a home.
func TestUmask(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "proc")
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("a", "", nil)) // whatever the umask of the test is; modes are set, not asked for
	for name, want := range map[string]os.FileMode{"a": 0o710, "a/diff": 0o755, "a/link": 0o644} {
		st, err := os.Stat(filepath.Join(d.home, name))
		must(t, err)
		if st.Mode().Perm() != want {
			t.Errorf("%s: %v", name, st.Mode())
		}
	}
}

// TestRemappedRoot: with an id map the layers belong to the container's root, and nothing else does (CVE-2021-21284).
func TestRemappedRoot(t *testing.T) {
	ids := []archive.IDRange{{ContainerID: 0, HostID: 100000, Size: 65536}}
	d := newTestDriver(t, t.TempDir(), Options{IDMap: archive.IDMap{UIDs: ids, GIDs: ids}})
	must(t, d.Create("a", "", nil))
	must(t, d.CreateReadWrite("b", "a", nil))
	_, put := get(t, d, "b")
	for name, want := range map[string]string{"b": "0:100000", "b/diff": "100000:100000", "b/work": "100000:100000",
		"b/merged": "100000:100000", "b/work/work": "100000:100000"} {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(d.home, name), &st))
		if got := fmt.Sprintf("%d:%d", st.Uid, st.Gid); got != want {
			t.Errorf("%s belongs to %s, want %s", name, got, want)
		}
	}
	put()
}

// TestBadIDs: moby and containers/storage make ../evil outside of the home.
func TestBadIDs(t *testing.T) {
	dir := t.TempDir()
	home := filepath.Join(dir, "home")
	d := newTestDriver(t, home, Options{})
	must(t, d.Create("good", "", nil))
	before := overlaytest.Tree(t, dir)
	for _, id := range badIDs {
		wantErr(t, d.Create(id, "", nil), ErrInvalidID)
		wantErr(t, d.CreateReadWrite(id, "good", nil), ErrInvalidID)
		wantErr(t, d.Remove(id), ErrInvalidID)
		wantErr(t, d.Put(id), ErrInvalidID)
		_, err := d.Get(id, "")
		wantErr(t, err, ErrInvalidID)
		_, err = d.GetMetadata(id)
		wantErr(t, err, ErrInvalidID)
		_, err = d.ApplyDiff(id, "", strings.NewReader(""))
		wantErr(t, err, ErrInvalidID)
		_, err = d.Diff(id, "")
		wantErr(t, err, ErrInvalidID)
		_, err = d.DiffSize(id, "")
		wantErr(t, err, ErrInvalidID)
		_, err = d.Changes(id, "")
		wantErr(t, err, ErrInvalidID)
		if d.Exists(id) {
			t.Errorf("%q exists", id)
		}
		if id != "" {
			wantErr(t, d.Create("new", id, nil), ErrInvalidID)
		}
	}
	overlaytest.Compare(t, before, overlaytest.Tree(t, dir))
}

func TestCreateOptions(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	wantErr(t, d.Create("a", "", &CreateOpts{StorageOpt: map[string]string{"size": "1G"}}), ErrInvalidOption)
	wantErr(t, d.CreateReadWrite("a", "", &CreateOpts{StorageOpt: map[string]string{"color": "red"}}), ErrInvalidOption)
	wantErr(t, d.CreateReadWrite("a", "", &CreateOpts{StorageOpt: map[string]string{"size": "0"}}), ErrInvalidOption)
	must(t, d.Create("b", "", &CreateOpts{StorageOpt: map[string]string{}})) // as Docker calls it
	opts := map[string]string{"SIZE": "1G"}
	before := maps.Clone(opts)
	_ = d.CreateReadWrite("a", "", &CreateOpts{StorageOpt: opts})
	if !maps.Equal(opts, before) {
		t.Errorf("the caller's options are now %q (moby writes into them)", opts)
	}
	if d.Exists("a") {
		must(t, d.Remove("a"))
	}
}

// TestCreateTwice: in moby a second Create deletes the first layer's data.
func TestCreateTwice(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("a", "", nil))
	fill(t, d, "a", `file f "precious"`)
	before := overlaytest.Tree(t, d.home)
	wantErr(t, d.Create("a", "", nil), ErrLayerExists)
	wantErr(t, d.CreateReadWrite("a", "", nil), os.ErrExist)
	overlaytest.Compare(t, before, overlaytest.Tree(t, d.home))
}

func TestCreateParentMissing(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	err := d.Create("a", "nobody", nil)
	wantErr(t, err, ErrLayerNotFound)
	if !strings.Contains(err.Error(), "nobody") {
		t.Errorf("the parent is not named: %v", err)
	}
	wantErr(t, d.Create("a", "a", nil), ErrInvalidID)
	if names := homeNames(t, d); len(names) > 0 {
		t.Errorf("left: %q", names)
	}
	wantLinks(t, d, 0)
}

// TestCreateFails: a failed Create leaves nothing, no link either.
func TestCreateFails(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("parent", "", nil))
	before := layout(t, d.home)
	// The very last step cannot succeed: something is in the way that checkFree can't see.
	n := newLayer{d: d, id: strings.Repeat("x", 300)}
	s, err := d.openStaging()
	must(t, err)
	defer s.close()
	n.s = s
	if err := n.make(); !errors.Is(err, unix.ENAMETOOLONG) {
		t.Fatalf("got %v", err)
	}
	if got := layout(t, d.home); got != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", got, before)
	}
}

func TestRemove(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Remove("never"))
	must(t, d.Create("base", "", nil))
	must(t, d.Create("mid", "base", nil))
	must(t, d.CreateReadWrite("top", "mid", nil))
	// In the peers these return nil, and the children are dead.
	wantErr(t, d.Remove("base"), ErrLayerInUse)
	wantErr(t, d.Remove("mid"), ErrLayerInUse)
	path, put := get(t, d, "top")
	must(t, os.WriteFile(filepath.Join(path, "f"), nil, 0o600))
	wantErr(t, d.Remove("top"), ErrLayerInUse)
	put()
	for _, id := range []string{"top", "mid", "base"} {
		must(t, d.Remove(id))
		if d.Exists(id) {
			t.Errorf("%s exists", id)
		}
		must(t, d.Remove(id))
	}
	must(t, d.Cleanup())
	wantEmptyHome(t, d)
}

// wantEmptyHome fails the test if anything is in the home but its skeleton.
func wantEmptyHome(t *testing.T, d *Driver) {
	t.Helper()
	if got, want := firstWords(overlaytest.Tree(t, d.home), 2), "\".\" dir\n\"l\" dir\n\"staging\" dir\n"; got != want {
		t.Errorf("the home holds\n%s", got)
	}
}

// TestRemoveLeftMounts: mounts that nobody counts are unmounted, and nothing behind
// them is deleted.
func TestRemoveLeftMounts(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	outside := t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "canary"), nil, 0o600))
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	// A Driver that is gone has mounted it, and somebody a directory within its diff.
	old := openTestDriver(t, d.home, Options{})
	_, err := old.Get("box", "")
	must(t, err)
	die(old)
	inner := filepath.Join(d.home, "box", "diff", "mnt")
	must(t, os.Mkdir(inner, 0o755))
	must(t, unix.Mount(outside, inner, "", unix.MS_BIND, ""))
	must(t, d.Remove("box"))
	must(t, d.Cleanup())
	if _, err := os.Stat(filepath.Join(outside, "canary")); err != nil {
		t.Fatalf("deleted through a mount: %v", err)
	}
	must(t, d.Remove("base"))
	must(t, d.Cleanup())
	wantEmptyHome(t, d)
}

// TestRemoveObeysNoFile: link = ".." made a peer delete its home.
func TestRemoveObeysNoFile(t *testing.T) {
	for name, content := range map[string]string{"dot dot": "..", "path": "../other", "empty": "", "another's": "OTHER", "absolute": "/etc"} {
		t.Run(name, func(t *testing.T) {
			d := newTestDriver(t, t.TempDir(), Options{})
			must(t, d.Create("other", "", nil))
			must(t, d.Create("bad", "", nil))
			if content == "OTHER" {
				data, err := os.ReadFile(filepath.Join(d.home, "other/link"))
				must(t, err)
				content = string(data)
			}
			must(t, os.WriteFile(filepath.Join(d.home, "bad/link"), []byte(content), 0o644))
			must(t, d.Remove("bad"))
			must(t, d.Cleanup())
			if d.Exists("bad") || !d.Exists("other") {
				t.Error("the wrong layer is gone")
			}
			wantLinks(t, d, 1)
		})
	}
}

// TestCreateRace: of many that make the same layer one succeeds, and that layer is whole.
func TestCreateRace(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	second := openTestDriver(t, d.home, Options{}) // as another process: it shares no lock
	must(t, d.Create("base", "", nil))
	for round := range 20 {
		id := sizeName(round)
		var wg sync.WaitGroup
		errs := make([]error, 8)
		for i := range errs {
			wg.Go(func() {
				use := d
				if i%2 == 1 {
					use = second
				}
				errs[i] = use.Create(id, "base", nil)
			})
		}
		wg.Wait()
		made := 0
		for _, err := range errs {
			if err == nil {
				made++
			} else if !errors.Is(err, ErrLayerExists) {
				t.Errorf("round %d: %v", round, err)
			}
		}
		if made != 1 {
			t.Errorf("round %d: made %d times", round, made)
		}
	}
	wantLinks(t, d, 21)
}

// TestParentRemovedMeanwhile: a child is made, or its parent is removed, never both.
func TestParentRemovedMeanwhile(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	second := openTestDriver(t, d.home, Options{})
	for round := range 50 {
		parent, child := fmt.Sprintf("p%d", round), fmt.Sprintf("c%d", round)
		must(t, d.Create(parent, "", nil))
		use := d
		if round%2 == 1 {
			use = second
		}
		var wg sync.WaitGroup
		var created, removed error
		wg.Go(func() { created = d.Create(child, parent, nil) })
		wg.Go(func() { removed = use.Remove(parent) })
		wg.Wait()
		if (created == nil) == (removed == nil) {
			t.Fatalf("round %d: create %v, remove %v", round, created, removed)
		}
	}
	must(t, second.Cleanup())
}

// TestRecovery: New deletes what a crash left of layers being made and removed, and their links.
func TestRecovery(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("keep", "", nil))
	must(t, d.Create("half", "", nil))
	must(t, d.Create("gone", "", nil))
	// As if killed before the rename that makes one appear, and after the one that removes the other.
	must(t, os.Rename(d.home+"/half", d.home+"/staging/new-CRASH"))
	must(t, os.Rename(d.home+"/gone", d.home+"/staging/trash-CRASH"))
	must(t, os.Mkdir(d.home+"/staging/new-EMPTY", 0o700))
	if problems, err := d.Check(); err != nil || len(problems) != 4 {
		t.Errorf("check: %v %v", problems, err)
	}
	again := openTestDriver(t, d.home, Options{})
	must(t, again.Cleanup())
	checkEmpty(t, again)
	wantLinks(t, again, 1)
	if !again.Exists("keep") {
		t.Error("layer lost")
	}
	// What another process is making now is left alone.
	s, err := d.openStaging()
	must(t, err)
	must(t, os.Mkdir(d.home+"/staging/new-LIVE", 0o700))
	openTestDriver(t, d.home, Options{})
	if _, err := os.Stat(d.home + "/staging/new-LIVE"); err != nil {
		t.Errorf("a layer being made was deleted: %v", err)
	}
	must(t, os.Remove(d.home+"/staging/new-LIVE"))
	s.close()
}
