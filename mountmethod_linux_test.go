package overlay2

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// methods are all ways of mounting that this kernel has.
func methods(t *testing.T) []MountMethod {
	t.Helper()
	d := openTestDriver(t, t.TempDir(), Options{MountMethod: MountDescriptors})
	all := []MountMethod{MountAuto, MountLegacy, MountDescriptors}
	if d.facts.newAPI == yes {
		all = append(all, MountNewAPI)
	}
	if _, err := New(t.TempDir(), Options{MountMethod: MountFiles}); err == nil {
		all = append(all, MountFiles)
	} else if !errors.Is(err, ErrNotSupported) {
		t.Errorf("New: %v", err)
	}
	return all
}

func TestLegacyLowers(t *testing.T) {
	for pageSize, want := range map[int]int{4 << 10: 128, 16 << 10: 500, 64 << 10: 500} {
		if got := legacyLowers(pageSize); got != want {
			t.Errorf("pages of %d bytes hold %d layers, want %d", pageSize, got, want)
		}
	}
	if linkRoom != len("l/"+linkA+":") {
		t.Errorf("a layer takes %d bytes", linkRoom)
	}
}

// deepChain makes a chain of n layers, each with a file of its own and one that all have.
func deepChain(t testing.TB, d *Driver, n int) (last string) {
	t.Helper()
	for i := range n {
		id := fmt.Sprintf("layer%d", i)
		must(t, d.Create(id, last, nil))
		must(t, os.WriteFile(fmt.Sprintf("%s/%s/diff/f%d", d.home, id, i), []byte(id), 0o600))
		must(t, os.WriteFile(fmt.Sprintf("%s/%s/diff/same", d.home, id), []byte(id), 0o600))
		last = id
	}
	return last
}

// wantChain fails the test unless path shows each of the n layers of deepChain.
func wantChain(t testing.TB, path string, n int) {
	t.Helper()
	for i := range n {
		id := fmt.Sprintf("layer%d", i)
		if data, err := os.ReadFile(filepath.Join(path, fmt.Sprintf("f%d", i))); err != nil || string(data) != id {
			t.Fatalf("layer %d: %q %v", i, data, err)
		}
	}
	if data, err := os.ReadFile(filepath.Join(path, "same")); err != nil || string(data) != fmt.Sprintf("layer%d", n-1) {
		t.Errorf("the nearest layer is not on top: %q %v", data, err)
	}
}

// TestDeepChain: as many layers as the way of mounting takes, in a home with a path longer
// than fsconfig(2) takes; one more is refused by Create.
func TestDeepChain(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	for _, method := range methods(t) {
		t.Run(method.String(), func(t *testing.T) {
			home := t.TempDir()
			for len(home) < 300 {
				home = filepath.Join(home, strings.Repeat("h", min(100, max(1, 299-len(home)))))
			}
			d := newTestDriver(t, home, Options{MountMethod: method})
			depth := maxLowers
			if method == MountLegacy {
				depth = legacyLowers(os.Getpagesize())
			}
			parent := deepChain(t, d, depth)
			long := strings.Repeat("top", 85) // 255 bytes
			must(t, d.CreateReadWrite(long, parent, nil))
			path, put := get(t, d, long)
			wantChain(t, path, depth)
			must(t, os.WriteFile(path+"/new", nil, 0o600))
			put()
			if _, err := os.Stat(filepath.Join(home, long, "diff", "new")); err != nil {
				t.Error(err)
			}
			wantErr(t, d.Create("too-deep", long, nil), ErrTooDeep)
			// Committed, a chain is a read-only mount of one layer more.
			path, put = get(t, d, parent)
			wantChain(t, path, depth)
			if err := os.WriteFile(path+"/new", nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("a committed layer can be written: %v", err)
			}
			put()
			if got := statusOf(d, "Max Depth"); got != fmt.Sprint(depth) {
				t.Errorf("Status says %s, mounted %d", got, depth)
			}
			if got := statusOf(d, "Mount Method"); got != method.String() {
				t.Errorf("Status says %s", got)
			}
		})
	}
}

// TestHeldChain: a chain whose names do not fit into a page is mounted by the directories that are held open: by their paths, or, if
// these are too many, by their numbers; and shows what was put in a layer's place since.
func TestHeldChain(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "proc")
	d := newTestDriver(t, t.TempDir(), Options{})
	asked := (d.facts.newAPI == yes || d.facts.descriptors == yes) && os.Getpagesize() == 4096 // else they may be mounted otherwise
	deepChain(t, d, maxLowers)
	lowers := func(path string) string {
		t.Helper()
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		must(t, err)
		_, line, _ := strings.Cut(string(mounts), " "+path+" ")
		line, _, _ = strings.Cut(line, "\n")
		_, line, _ = strings.Cut(line, ",lowerdir=")
		lower, _, _ := strings.Cut(line, ",")
		return lower
	}
	for depth, names := range map[int]string{127: "^(/proc/self/fd/[0-9]+:?)+$", maxLowers: "^([0-9]+:?)+$"} {
		id := fmt.Sprintf("box%d", depth)
		must(t, d.CreateReadWrite(id, fmt.Sprintf("layer%d", depth-1), nil))
		for range 3 { // the directories are held when they are old enough
			time.Sleep(2 * settleTime)
			_, put := get(t, d, id)
			put()
		}
		path, put := get(t, d, id)
		wantChain(t, path, depth)
		if got := lowers(path); asked && !regexp.MustCompile(names).MatchString(got) {
			t.Errorf("mounted by %.200q", got)
		}
		put()
		layer := filepath.Join(d.home, "layer5")
		must(t, os.Rename(layer+"/diff", layer+"/old"))
		must(t, os.Mkdir(layer+"/diff", 0o755))
		must(t, os.WriteFile(layer+"/diff/other", nil, 0o600))
		path, put = get(t, d, id)
		if _, err := os.Stat(path + "/other"); err != nil {
			t.Errorf("the layer is another now: %v", err)
		}
		put()
		must(t, os.RemoveAll(layer+"/diff"))
		must(t, os.Rename(layer+"/old", layer+"/diff"))
	}
}

// statusOf returns one line of Status.
func statusOf(d *Driver, key string) string {
	for _, s := range d.Status() {
		if s[0] == key {
			return s[1]
		}
	}
	return ""
}

// TestMethodHomeNames: no way of mounting minds what a home's path holds.
func TestMethodHomeNames(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	for _, method := range methods(t) {
		for _, name := range []string{"a,b", "a:b", `a\b`, `\\`, "a b", "a\nb", "a\tb\"c", `a,b:c\d,upperdir=/x`, "\xff\xfe", strings.Repeat("x", 255)} {
			t.Run(method.String(), func(t *testing.T) {
				d := newTestDriver(t, filepath.Join(t.TempDir(), name), Options{MountMethod: method})
				parent := deepChain(t, d, 3)
				must(t, d.CreateReadWrite("a,b:c\\d e", parent, nil))
				path, put := get(t, d, "a,b:c\\d e")
				wantChain(t, path, 3)
				must(t, os.WriteFile(path+"/new", nil, 0o600))
				put()
				if _, err := os.Stat(d.home + "/a,b:c\\d e/diff/new"); err != nil {
					t.Errorf("written elsewhere: %v", err)
				}
				path, put = get(t, d, parent)
				wantChain(t, path, 3)
				put()
			})
		}
	}
}

// TestForcedMethods: whichever way mounts, the tree is the same, and so is what an unmount leaves.
func TestForcedMethods(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	want := ""
	for _, method := range methods(t) {
		t.Run(method.String(), func(t *testing.T) {
			d := newTestDriver(t, t.TempDir(), Options{MountMethod: method, MountOptions: []string{"xino=off", "metacopy=on"}})
			parent := deepChain(t, d, 20)
			must(t, d.CreateReadWrite("box", parent, nil))
			fill(t, d, "box", "dir d\nfile d/g \"new\"")
			path, put := get(t, d, "box")
			must(t, errors.Join(os.WriteFile(path+"/f3", []byte("changed"), 0o600), os.Remove(path+"/f4"), os.Chmod(path+"/f5", 0o640)))
			put()
			got := firstWords(tree(t, d, "box"), 4)
			if want == "" {
				want = got
			}
			overlaytest.Compare(t, want, got)
		})
	}
}

// TestMethodMissing: a way that the kernel lacks is refused by New, not by the first Get.
func TestMethodMissing(t *testing.T) {
	f := facts{newAPI: no, newAPIErr: unix.ENOSYS, descriptors: unknown, descriptorsErr: unix.EMFILE, files: no, filesErr: unix.EBADF}
	for method, want := range map[MountMethod]error{MountNewAPI: unix.ENOSYS, MountDescriptors: unix.EMFILE, MountFiles: unix.EBADF} {
		if err := f.checkMethod(method); !errors.Is(err, ErrNotSupported) || !errors.Is(err, want) {
			t.Errorf("%v: %v", method, err)
		}
	}
	if got := f.maxDepth(MountAuto); got != legacyLowers(os.Getpagesize()) {
		t.Errorf("%d layers without any new way", got)
	}
	for _, f := range []facts{{newAPI: yes}, {descriptors: yes}} {
		if got := f.maxDepth(MountAuto); got != maxLowers {
			t.Errorf("%+v: %d layers", f, got)
		}
	}
}

// TestAutoWithout: where the new API is missing deep chains go by descriptors, where that
// is missing too by relative names, and beyond that there is an error, never a wrong mount.
func TestAutoWithout(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{MountMethod: MountDescriptors})
	d.opts.MountMethod = MountAuto
	depth := legacyLowers(os.Getpagesize()) + 22
	if depth > maxLowers {
		depth = maxLowers
	}
	parent := deepChain(t, d, depth)
	must(t, d.CreateReadWrite("box", parent, nil))
	d.facts.newAPI = no
	path, put := get(t, d, "box")
	wantChain(t, path, depth)
	put()
	d.facts.descriptors = no
	if depth < maxLowers {
		_, err := d.Get("box", "")
		wantErr(t, err, ErrMountTooLong)
	}
	near := fmt.Sprintf("layer%d", legacyLowers(os.Getpagesize())-1)
	path, put = get(t, d, near)
	wantChain(t, path, legacyLowers(os.Getpagesize()))
	put()
}

// TestKernelText: an error of the new API is in the kernel's own words.
func TestKernelText(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	if d.facts.newAPI != yes {
		t.Log("the kernel doesn't have it; see TestMethodMissing")
		return
	}
	c, err := sys.OpenFS("overlay")
	must(t, err)
	defer func() { must(t, c.Close()) }()
	c.Set("nonsense", "1")
	c.Set("lowerdir+", d.home) // after the first error nothing is done
	_, err = c.Mount(0)
	var me *sys.MountError
	if !errors.As(err, &me) || me.Target != "nonsense" || !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "nonsense") || me.Text == "" {
		t.Errorf("got %v", err)
	}
	// More layers than the kernel takes.
	for range maxLowers + 1 {
		c.Set("lowerdir+", d.home)
	}
	if _, err = c.Mount(0); !errors.As(err, &me) || me.Text == "" {
		t.Errorf("got %v", err)
	}
	t.Log(err)
}

// TestKnownLinks: what Get remembers of links never hides that one was tampered with since.
func TestKnownLinks(t *testing.T) {
	for name, tamper := range map[string]func(t *testing.T, home string){
		"to etc":       func(t *testing.T, home string) { replaceLink(t, home, "base", "/etc") },
		"to another":   func(t *testing.T, home string) { replaceLink(t, home, "base", "../other/diff2") },
		"missing":      func(t *testing.T, home string) { must(t, os.Remove(linkPath(t, home, "base"))) },
		"diff moved":   func(t *testing.T, home string) { must(t, os.Rename(home+"/base/diff", home+"/base/old")) },
		"diff file":    func(t *testing.T, home string) { swapDir(t, home+"/base/diff", fileAt) },
		"diff symlink": func(t *testing.T, home string) { swapDir(t, home+"/base/diff", symlink("/etc")) },
		"parent gone":  func(t *testing.T, home string) { must(t, os.Rename(home+"/base", home+"/gone")) },
		"home renewed": func(t *testing.T, home string) {
			overlaytest.CopyTree(t, home, home+".copy")
			must(t, os.RemoveAll(home))
			must(t, os.Rename(home+".copy", home))
			must(t, os.RemoveAll(home+"/base/diff"))
		},
	} {
		for _, held := range []string{"", ", held", ", held, not watched", ", held, not watched, coarse times"} {
			t.Run(name+held, func(t *testing.T) { testKnownLinks(t, held, tamper) })
		}
	}
}

// settle gets a layer often enough for those below it to be held open.
func settle(t *testing.T, d *Driver, id string) {
	t.Helper()
	for range 2 {
		time.Sleep(2 * settleTime)
		_, put := get(t, d, id)
		put()
	}
}

func testKnownLinks(t *testing.T, held string, tamper func(t *testing.T, home string)) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	d, err := New(filepath.Join(t.TempDir(), "home"), Options{})
	must(t, err)
	t.Cleanup(func() { must(t, d.Cleanup()) })
	if strings.HasSuffix(held, "coarse times") {
		d.known.settle = settleTime
	}
	watched := held == ", held"
	d.known.watches.off = !watched
	must(t, d.Create("base", "", nil))
	must(t, d.Create("other", "", nil))
	must(t, os.Mkdir(d.home+"/other/diff2", 0o755))
	must(t, d.CreateReadWrite("box", "base", nil))
	for range 2 {
		_, put := get(t, d, "box")
		put()
	}
	if held != "" {
		settle(t, d, "box")
		if d.known.held != 1 {
			t.Fatalf("%d directories are held", d.known.held)
		}
	}
	if got := watchedLinks(d); got != map[bool]int{true: 1}[watched] {
		t.Fatalf("%d directories are watched", got)
	}
	if len(d.known.m) != 2 {
		t.Fatalf("%d links are known", len(d.known.m))
	}
	tamper(t, d.home)
	_, err = d.Get("box", "")
	wantErr(t, err, ErrCorrupt)
	if len(d.known.m) != 1 {
		t.Errorf("%d links are known after that", len(d.known.m))
	}
}

// watchedLinks counts the links that are known to lead where they did.
func watchedLinks(d *Driver) (n int) {
	d.known.mu.Lock()
	defer d.known.mu.Unlock()
	d.known.readWatches()
	for _, l := range d.known.m {
		if l.watch != nil && l.watch.ok {
			n++
		}
	}
	return n
}

// TestWatches: what the kernel has told of no change of is not looked at again, and what it has is, whoever
// made the change.
func TestWatches(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	d := newTestDriver(t, filepath.Join(t.TempDir(), "home"), Options{})
	other := openTestDriver(t, d.home, Options{})
	parent := ""
	for _, id := range []string{"a", "b", "c"} {
		must(t, d.Create(id, parent, nil))
		parent = id
	}
	must(t, d.CreateReadWrite("box", parent, nil))
	getPut := func() {
		_, put := get(t, d, "box")
		put()
	}
	settle(t, d, "box")
	want := func(what string, n int) {
		t.Helper()
		if got := watchedLinks(d); got != n {
			t.Errorf("%s: %d links are sure, want %d", what, got, n)
		}
	}
	want("settled", 3)
	// What calls do to other layers, and above these, says nothing of them.
	must(t, other.Create("x", "c", nil))
	must(t, other.Create("y", "a", nil))
	must(t, other.Remove("x"))
	_, put := get(t, other, "b")
	put()
	getPut()
	want("others", 3)
	must(t, os.Chmod(d.home+"/b/diff", 0o700))
	want("mode", 2)
	getPut()
	want("mode, again", 3)
	// In place, so that no directory changes.
	link, err := os.ReadFile(d.home + "/b/link")
	must(t, err)
	must(t, os.WriteFile(d.home+"/b/link", []byte(linkA), 0o644))
	want("link file", 2)
	must(t, os.WriteFile(d.home+"/b/link", link, 0o644))
	getPut()
	want("link file, again", 3)
	must(t, os.WriteFile(d.home+"/a/lower", []byte("l/"+linkA), 0o644))
	want("lower of the base", 2)
	_, err = d.Get("box", "")
	wantErr(t, err, ErrCorrupt)
	must(t, os.Remove(d.home+"/a/lower"))
	getPut()
	want("lower of the base, again", 3)
	must(t, os.Rename(d.home+"/l", d.home+"/l.old"))
	want("l moved", 0)
	must(t, os.Rename(d.home+"/l.old", d.home+"/l"))
	getPut()
	want("l moved, again", 3)
	// More than the kernel keeps.
	for i := range 20_000 {
		name := fmt.Sprint(d.home, "/l/", i)
		must(t, os.Symlink("x", name))
		must(t, os.Remove(name))
	}
	want("overflow", 0)
	getPut()
	want("overflow, again", 3)
	must(t, d.Cleanup())
	want("cleanup", 0)
}

// TestHeldDirs: with directories held open too many layers for a page by their names are mounted by the kernel's
// quickest way; what is mounted is the same; and a layer that others remove is not kept from going.
func TestHeldDirs(t *testing.T) {
	for _, depth := range []int{100, 200} {
		t.Run(fmt.Sprint(depth), func(t *testing.T) {
			d := newTestDriver(t, filepath.Join(t.TempDir(), strings.Repeat("h", 100)), Options{})
			parent := ""
			for i := range depth {
				id := fmt.Sprintf("layer%d", i)
				must(t, d.Create(id, parent, nil))
				must(t, os.WriteFile(filepath.Join(d.home, id, "diff", fmt.Sprint(i)), nil, 0o600))
				parent = id
			}
			must(t, d.CreateReadWrite("box", parent, nil))
			want := tree(t, d, "box", overlaytest.NoRootTime)
			settle(t, d, "box")
			if d.known.held != depth {
				t.Errorf("%d directories are held", d.known.held)
			}
			overlaytest.Compare(t, want, tree(t, d, "box", overlaytest.NoRootTime))
			// A committed layer too.
			must(t, d.Create("end", "box", nil))
			settle(t, d, "box")
			overlaytest.Compare(t, want, tree(t, d, "box", overlaytest.NoRootTime))
			must(t, errors.Join(d.Remove("end"), d.Remove("box"), d.Remove(parent)))
			if d.known.held != depth-1 {
				t.Errorf("%d directories are held", d.known.held)
			}
		})
	}
}

// TestHeldDirMoved: a directory that is held but no longer the layer's is not what is mounted, also where
// times are too coarse to tell whether l/ has changed.
func TestHeldDirMoved(t *testing.T) {
	d := newTestDriver(t, filepath.Join(t.TempDir(), strings.Repeat("h", 100)), Options{})
	parent := ""
	for i := range 100 {
		id := fmt.Sprintf("layer%d", i)
		must(t, d.Create(id, parent, nil))
		parent = id
	}
	must(t, os.WriteFile(d.home+"/layer0/diff/right", nil, 0o600))
	must(t, d.CreateReadWrite("box", parent, nil))
	want := tree(t, d, "box", overlaytest.NoRootTime)
	settle(t, d, "box")
	if d.known.held != 100 {
		t.Fatalf("%d directories are held", d.known.held)
	}
	d.known.settle = time.Hour
	// The very same diff, link and lower in another directory of the same name.
	old, now := d.home+".old", d.home+"/layer0"
	must(t, os.Rename(now, old))
	must(t, os.Mkdir(now, 0o710))
	for _, name := range []string{"diff", "link", "committed"} {
		must(t, os.Rename(filepath.Join(old, name), filepath.Join(now, name)))
	}
	must(t, os.Mkdir(old+"/diff", 0o755))
	must(t, os.WriteFile(old+"/diff/wrong", nil, 0o600))
	overlaytest.Compare(t, want, tree(t, d, "box", overlaytest.NoRootTime))
}

func fileAt(path string) error { return os.WriteFile(path, nil, 0o600) }

// TestKnownLinksReplaced: a directory replaced by an honest one is seen at once.
func TestKnownLinksReplaced(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	_, put := get(t, d, "box")
	put()
	settle(t, d, "box")
	swapDir(t, d.home+"/base/diff", directory)
	must(t, os.WriteFile(d.home+"/base/diff/new", nil, 0o600))
	path, put := get(t, d, "box")
	if _, err := os.Stat(path + "/new"); err != nil {
		t.Error(err)
	}
	put()
	must(t, d.Remove("box"))
	must(t, d.Remove("base"))
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	_, put = get(t, d, "box")
	put()
}

// TestKnownLinksBounded: the memory for links doesn't grow without end.
func TestKnownLinksBounded(t *testing.T) {
	var k knownLinks
	for i := range 3 * maxKnownLinks {
		k.add(fmt.Sprint(i), knownLink{id: "x"})
	}
	if len(k.m) == 0 || len(k.m) > maxKnownLinks {
		t.Errorf("%d links", len(k.m))
	}
}
