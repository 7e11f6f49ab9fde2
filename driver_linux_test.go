package overlay2

import (
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/sirupsen/logrus"
)

// newTestDriver opens home and, at the end of the test, makes sure that its layers are in
// order and that nothing is left mounted or open.
func newTestDriver(t *testing.T, home string, opts Options) *Driver {
	t.Helper()
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	return openTestDriver(t, home, opts)
}

// openTestDriver is newTestDriver for a second Driver of a test.
func openTestDriver(t *testing.T, home string, opts Options) *Driver {
	t.Helper()
	if opts.Log == nil {
		log := logrus.New()
		log.SetOutput(testWriter{t})
		opts.Log = logrus.NewEntry(log)
	}
	d, err := New(home, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Cleanup(); err != nil {
			t.Error(err)
		}
		if !t.Failed() {
			checkEmpty(t, d)
		}
	})
	return d
}

// testWriter makes whatever the driver logs a failure: nothing that a test does may need it.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Errorf("logged: %s", p)
	return len(p), nil
}

// checkEmpty reports what Check finds.
func checkEmpty(t *testing.T, d *Driver) {
	t.Helper()
	problems, err := d.Check()
	if err != nil {
		t.Error(err)
	}
	for _, p := range problems {
		t.Errorf("check: %v", p)
	}
}

// must fails the test on an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantErr fails the test unless err is want and a LayerError of the call.
func wantErr(t testing.TB, err, want error) {
	t.Helper()
	var le *LayerError
	if !errors.Is(err, want) || !errors.As(err, &le) {
		t.Fatalf("got error %v, want a LayerError with %v", err, want)
	}
}

// get is Get with a Put at the end of the test, unless put is called.
func get(t testing.TB, d *Driver, id string) (path string, put func()) {
	t.Helper()
	path, err := d.Get(id, "")
	must(t, err)
	done := false
	put = func() {
		t.Helper()
		if !done {
			done = true
			must(t, d.Put(id))
		}
	}
	t.Cleanup(put)
	return path, put
}

// fill mounts the layer, builds text in it, and unmounts it.
func fill(t testing.TB, d *Driver, id, text string) {
	t.Helper()
	path, put := get(t, d, id)
	overlaytest.Build(t, path, text)
	put()
}

// tree returns the merged tree of the layer.
func tree(t testing.TB, d *Driver, id string, opts ...overlaytest.TreeOption) string {
	t.Helper()
	path, put := get(t, d, id)
	defer put()
	return overlaytest.Tree(t, path, append(opts, overlaytest.NoOverlayXattrs)...)
}

// homeNames lists what lies in the home, except l and staging.
func homeNames(t testing.TB, d *Driver) []string {
	t.Helper()
	entries, err := os.ReadDir(d.home)
	must(t, err)
	names := []string{}
	for _, e := range entries {
		if e.Name() != linkDir && e.Name() != stagingDir {
			names = append(names, e.Name())
		}
	}
	return names
}

// wantLinks fails the test unless l/ holds n links.
func wantLinks(t testing.TB, d *Driver, n int) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(d.home, linkDir))
	must(t, err)
	if len(entries) != n {
		t.Errorf("%d links in l/, want %d", len(entries), n)
	}
}

// TestNewMakesHome: nobody but root and the remapped group gets into the home, so that no user of the host reaches a
// setuid program in a layer (CVE-2021-41091).
func TestNewMakesHome(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		home := filepath.Join(dir, "new", "parent", "home")
		d := newTestDriver(t, home, Options{})
		for path, want := range map[string]fs.FileMode{home: 0o710, home + "/l": 0o700, filepath.Dir(home): 0o755} {
			st, err := os.Stat(path)
			must(t, err)
			if st.Mode().Perm() != want {
				t.Errorf("%s has mode %v, want %v", path, st.Mode().Perm(), want)
			}
		}
		if names := homeNames(t, d); len(names) > 0 {
			t.Errorf("a new home holds %q", names)
		}
		if d.String() != "overlay2" {
			t.Error(d.String())
		}
		status := d.Status()
		for i, want := range [][2]string{{"Backing Filesystem"}, {"Supports d_type", "true"}, {"Using metacopy", "false"}, {"Native Overlay Diff", "true"}, {"userxattr", "false"}} {
			if status[i][0] != want[0] || want[1] != "" && status[i][1] != want[1] {
				t.Errorf("status %d is %q, want %q", i, status[i], want)
			}
		}
		fsName := map[string]string{"ext4": "extfs"}
		want := filepath.Base(t.Name())
		if n, ok := fsName[want]; ok {
			want = n
		}
		if status[0][1] != want {
			t.Errorf("backing filesystem %q on %s", status[0][1], filepath.Base(t.Name()))
		}
	})
}

func TestNewRefuses(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	for name, opts := range map[string]Options{
		"mount option":    {MountOptions: []string{"lowerdir=/etc"}},
		"two in one":      {MountOptions: []string{"xino=on,upperdir=/etc"}},
		"id map":          {IDMap: archive.IDMap{UIDs: []archive.IDRange{{Size: 0}}}},
		"map w/o root":    {IDMap: archive.IDMap{UIDs: []archive.IDRange{{ContainerID: 1, HostID: 1000, Size: 10}}}},
		"unknown method":  {MountMethod: 77},
		"value of option": {MountOptions: []string{"metacopy=maybe"}},
	} {
		if _, err := New(filepath.Join(dir, "home"), opts); !errors.Is(err, ErrInvalidOption) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := New("", Options{}); !errors.Is(err, ErrInvalidOption) {
		t.Errorf("empty home: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	if _, err := New(filepath.Join(dir, "file"), Options{}); err == nil {
		t.Error("a file as home")
	}
	if _, err := New(filepath.Join(dir, "file", "home"), Options{}); err == nil {
		t.Error("a home below a file")
	}
	entries, err := os.ReadDir(dir)
	must(t, err)
	if len(entries) != 1 {
		t.Errorf("left in the directory: %v", entries)
	}
}

func TestCheckKernel(t *testing.T) {
	v := func(major, minor int) sys.KernelVersion { return sys.KernelVersion{Major: major, Minor: minor} }
	for _, c := range []struct {
		kernel sys.KernelVersion
		fs     string
		want   error
	}{
		{v(3, 18), "extfs", ErrNotSupported}, {v(4, 0), "extfs", nil}, {v(6, 18), "extfs", nil},
		{v(4, 6), "btrfs", ErrIncompatibleFS}, {v(4, 7), "btrfs", nil}, {v(4, 6), "xfs", nil},
	} {
		if err := checkKernel(c.kernel, c.fs); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%v on %s: %v, want %v", c.kernel, c.fs, err, c.want)
		}
	}
}

// TestNewOnOverlay: overlayfs cannot be the upper layer of another (except with features
// that these mounts do not have); New must say so and leave nothing.
func TestNewOnOverlay(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	for _, name := range []string{"lower", "upper", "work", "merged"} {
		must(t, os.Mkdir(filepath.Join(dir, name), 0o755))
	}
	overlaytest.Mount(t, []string{dir + "/lower"}, dir+"/upper", dir+"/work", dir+"/merged")
	_, err := New(dir+"/merged/home", Options{})
	if !errors.Is(err, ErrIncompatibleFS) || !errors.Is(err, ErrNotSupported) {
		t.Errorf("got %v", err)
	}
	if err != nil && !strings.Contains(err.Error(), "overlayfs") {
		t.Errorf("the error doesn't name the filesystem: %v", err)
	}
	if entries, err := os.ReadDir(dir + "/merged"); err != nil || len(entries) > 0 {
		t.Errorf("left: %v %v", entries, err)
	}
}

// TestHomeNames: a home's path may hold what separates mount options.
func TestHomeNames(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	for _, name := range []string{"a,b", "a:b", `a\b`, "a b", "a\nb", `a,b:c\d,upperdir=/x`, "\xff\xfe", strings.Repeat("x", 200)} {
		t.Run("", func(t *testing.T) {
			d := newTestDriver(t, filepath.Join(t.TempDir(), name), Options{})
			must(t, d.Create("base", "", nil))
			fill(t, d, "base", `file f "base"`)
			must(t, d.CreateReadWrite("top", "base", nil))
			fill(t, d, "top", `file g "top"`)
			overlaytest.Compare(t, `"." dir`+"\n"+`"f" file`+"\n"+`"g" file`+"\n", firstWords(tree(t, d, "top"), 2))
		})
	}
}

// firstWords cuts each line of a tree after n words.
func firstWords(tree string, n int) string {
	var b strings.Builder
	for line := range strings.Lines(tree) {
		words := strings.Fields(line)
		b.WriteString(strings.Join(words[:min(n, len(words))], " ") + "\n")
	}
	return b.String()
}

// TestHomeRelative: a home is made absolute once, when New is called.
func TestHomeRelative(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	dir := t.TempDir()
	t.Chdir(dir)
	d := newTestDriver(t, "home", Options{})
	t.Chdir("/")
	must(t, d.Create("a", "", nil))
	if _, err := os.Stat(filepath.Join(dir, "home", "a")); err != nil {
		t.Error(err)
	}
}

func TestGetMetadata(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("a", "", nil))
	must(t, d.Create("b", "a", nil))
	must(t, d.CreateReadWrite("c", "b", nil))
	path := func(id, name string) string { return d.home + "/" + id + "/" + name }
	want := map[string]string{
		"UpperDir": path("c", "diff"), "WorkDir": path("c", "work"), "MergedDir": path("c", "merged"),
		"LowerDir": path("b", "diff") + ":" + path("a", "diff"),
	}
	got, err := d.GetMetadata("c")
	must(t, err)
	if !maps.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	got, err = d.GetMetadata("a")
	must(t, err)
	if keys := slices.Sorted(maps.Keys(got)); !slices.Equal(keys, []string{"MergedDir", "UpperDir", "WorkDir"}) {
		t.Errorf("base layer has %q", keys)
	}
	_, err = d.GetMetadata("none")
	wantErr(t, err, ErrLayerNotFound)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Error("not fs.ErrNotExist")
	}
}

// TestTwoDrivers: two Drivers in one process share nothing.
func TestTwoDrivers(t *testing.T) {
	a := newTestDriver(t, t.TempDir(), Options{})
	b := openTestDriver(t, t.TempDir(), Options{})
	must(t, a.Create("x", "", nil))
	if b.Exists("x") {
		t.Error("the other driver has the layer")
	}
	must(t, b.Create("x", "", nil))
	_, put := get(t, a, "x")
	defer put()
	must(t, b.Remove("x"))
	if !a.Exists("x") {
		t.Error("layer lost")
	}
}

// BenchmarkNew opens a home of some thousand layers.
func BenchmarkNew(b *testing.B) {
	overlaytest.Require(b, "root", "overlay")
	for _, layers := range []int{10, 10000} {
		b.Run(sizeName(layers), func(b *testing.B) {
			home := b.TempDir()
			log := logrus.New()
			log.SetOutput(io.Discard)
			opts := Options{Log: logrus.NewEntry(log)}
			d, err := New(home, opts)
			must(b, err)
			for i := range layers {
				must(b, d.Create(sizeName(i), "", nil))
			}
			b.ReportAllocs()
			for b.Loop() {
				_, err := New(home, opts)
				must(b, err)
			}
		})
	}
}

// TestNewWithoutDType: overlayfs needs the types of entries; New says how to make a filesystem that tells them.
func TestNewWithoutDType(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "ext4", Mkfs: []string{"-O", "^filetype"}})
	overlaytest.NoLeaks(t)
	_, err := New(dir+"/home", Options{})
	if !errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), "tune2fs -O filetype") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(dir + "/home"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the home stays: %v", err)
	}
}
