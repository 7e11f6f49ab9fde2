//go:build linux

package graphdriver

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/moby/moby/v2/daemon/graphdriver"
	"github.com/moby/moby/v2/daemon/graphdriver/graphtest"
	"github.com/moby/sys/user"
)

// name is what the suite's one driver is registered by; the suite silently takes the first it made for any other.
const name = "overlay2test"

func TestMain(m *testing.M) {
	if err := Register(name); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// TestSuite is moby's own suite for storage drivers. The first and last part hold its one driver.
func TestSuite(t *testing.T) {
	overlaytest.Require(t, "root")
	graphtest.GetDriver(t, name)
	t.Run("CreateEmpty", func(t *testing.T) { graphtest.DriverTestCreateEmpty(t, name) })
	t.Run("CreateBase", func(t *testing.T) { graphtest.DriverTestCreateBase(t, name) })
	t.Run("CreateSnap", func(t *testing.T) { graphtest.DriverTestCreateSnap(t, name) })
	t.Run("128LayerRead", func(t *testing.T) { graphtest.DriverTestDeepLayerRead(t, 128, name) })
	t.Run("DiffApply10Files", func(t *testing.T) { graphtest.DriverTestDiffApply(t, 10, name) })
	// moby leaves this one out for its own driver.
	t.Run("Changes", func(t *testing.T) { graphtest.DriverTestChanges(t, name) })
	t.Run("Quota", func(t *testing.T) {
		d, ok := graphtest.GetDriver(t, name).(*graphtest.Driver)
		if !ok {
			t.Fatal("not the suite's driver")
		}
		defer graphtest.PutDriver(t)
		status := d.Status()
		i := slices.IndexFunc(status, func(s [2]string) bool { return s[0] == "Project Quota" })
		if i < 0 || status[i][1] != "true" {
			overlaytest.Missing(t, "quota", errors.New("none on the filesystem of TMPDIR"))
		}
		graphtest.DriverTestSetQuota(t, name, true)
		// The suite leaves its layer mounted: moby's driver drops all mounts at Cleanup.
		must(t, d.Put(name+"Test"))
		must(t, d.Remove(name+"Test"))
	})
	graphtest.PutDriver(t)
}

// open opens a driver as the daemon does.
func open(t *testing.T, root string, options ...string) graphdriver.Driver {
	t.Helper()
	overlaytest.Require(t, "root")
	d, err := graphdriver.New(name, graphdriver.Options{Root: root, DriverOptions: options})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Cleanup(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// TestDiffGetter reads each file of a layer as the daemon does for docker save.
func TestDiffGetter(t *testing.T) {
	d := open(t, t.TempDir())
	must(t, d.Create("base", "", nil))
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range []string{"a", "b/c"} {
		must(t, w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(name))}))
		_, err := io.WriteString(w, name)
		must(t, err)
	}
	must(t, w.Close())
	_, err := d.ApplyDiff("base", "", &b)
	must(t, err)
	dg, ok := d.(graphdriver.DiffGetterDriver)
	if !ok {
		t.Fatal("no DiffGetterDriver")
	}
	g, err := dg.DiffGetter("base")
	must(t, err)
	for _, name := range []string{"a", "b/c"} {
		f, err := g.Get(name)
		must(t, err)
		got, err := io.ReadAll(f)
		must(t, errors.Join(err, f.Close()))
		if string(got) != name {
			t.Errorf("%s holds %q", name, got)
		}
	}
	must(t, g.Close())
	must(t, d.Remove("base"))
}

// TestErrors: what the daemon asks of errors, and what it is told of what cannot be.
func TestErrors(t *testing.T) {
	overlaytest.Require(t, "root")
	if err := Register(name); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("registered twice: %v", err)
	}
	for _, options := range [][]string{{"overlay2.nonsense=1"}, {"overlay2.size"}, {"overlay2.size=-1"}} {
		if _, err := Init(t.TempDir(), options, user.IdentityMapping{}); !errors.Is(err, overlay2.ErrInvalidOption) {
			t.Errorf("%q: %v", options, err)
		}
	}
	bad := user.IdentityMapping{UIDMaps: []user.IDMap{{ID: -1, ParentID: 0, Count: 1}}}
	if _, err := Init(t.TempDir(), nil, bad); !errors.Is(err, overlay2.ErrInvalidOption) {
		t.Errorf("id map: %v", err)
	}
	// An overlay cannot lie on what cannot hold one; the daemon goes on to the next driver then.
	if _, err := Init("/proc/overlay2", nil, user.IdentityMapping{}); err == nil {
		t.Error("a home in /proc")
	}
	d := open(t, t.TempDir())
	opts := &graphdriver.CreateOpts{StorageOpt: map[string]string{"size": "1X"}}
	if err := d.CreateReadWrite("box", "", opts); !errors.Is(err, overlay2.ErrInvalidOption) {
		t.Errorf("size: %v", err)
	}
	if _, err := d.Get("missing", ""); !errors.Is(err, overlay2.ErrLayerNotFound) {
		t.Errorf("get: %v", err)
	}
	if !graphdriver.IsDriverNotSupported(overlay2.ErrNotSupported) {
		t.Error("the daemon does not know ErrNotSupported")
	}
}

// TestIdentityMapping: with user namespace remapping on, layers belong to the remapped root.
func TestIdentityMapping(t *testing.T) {
	overlaytest.Require(t, "root")
	ids := []user.IDMap{{ID: 0, ParentID: 100000, Count: 65536}}
	root := filepath.Join(t.TempDir(), "home")
	d, err := Init(root, nil, user.IdentityMapping{UIDMaps: ids, GIDMaps: ids})
	must(t, err)
	defer func() { must(t, d.Cleanup()) }()
	must(t, d.Create("base", "", nil))
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, w.WriteHeader(&tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o644, Uid: 7}))
	must(t, w.Close())
	_, err = d.ApplyDiff("base", "", &b)
	must(t, err)
	if uid := owner(t, filepath.Join(root, "base/diff")); uid != 100000 {
		t.Errorf("diff belongs to %d", uid)
	}
	if uid := owner(t, filepath.Join(root, "base/diff/f")); uid != 100007 {
		t.Errorf("f belongs to %d", uid)
	}
	must(t, d.Remove("base"))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func BenchmarkExists(b *testing.B)           { graphtest.DriverBenchExists(bench(b), name) }
func BenchmarkGetEmpty(b *testing.B)         { graphtest.DriverBenchGetEmpty(bench(b), name) }
func BenchmarkDiffBase(b *testing.B)         { graphtest.DriverBenchDiffBase(bench(b), name) }
func BenchmarkDiffSmallUpper(b *testing.B)   { graphtest.DriverBenchDiffN(bench(b), 10, 10, name) }
func BenchmarkDiff10KFileUpper(b *testing.B) { graphtest.DriverBenchDiffN(bench(b), 10, 10_000, name) }
func BenchmarkDiff10KFilesBottom(b *testing.B) {
	graphtest.DriverBenchDiffN(bench(b), 10_000, 10, name)
}
func BenchmarkDiffApply100(b *testing.B) { graphtest.DriverBenchDiffApplyN(bench(b), 100, name) }
func BenchmarkDiff20Layers(b *testing.B) { graphtest.DriverBenchDeepLayerDiff(bench(b), 20, name) }
func BenchmarkRead20Layers(b *testing.B) { graphtest.DriverBenchDeepLayerRead(bench(b), 20, name) }

// bench is b, on a machine where the suite's benchmarks can run.
func bench(b *testing.B) *testing.B {
	b.Helper()
	overlaytest.Require(b, "root")
	return b
}
