package overlay2

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/quota"
)

// wantLimits fails unless a layer has these limits.
func wantLimits(t *testing.T, d *Driver, id string, size, inodes uint64) {
	t.Helper()
	if u, err := d.Usage(id); err != nil || u.MaxBytes != size || u.MaxInodes != inodes {
		t.Errorf("limits of %s are %d and %d, want %d and %d: %v", id, u.MaxBytes, u.MaxInodes, size, inodes, err)
	}
}

// TestResizeLive: a mounted layer that is full has room at once, and can be made smaller
// again; the limit that isn't named stays, and so does the layer's neighbour.
func TestResizeLive(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{})
		apply(t, d, "base", "", makeTar(t, file("a", "1")))
		must(t, d.CreateReadWrite("box", "base", storage("size=8m", "inodes=60")))
		must(t, d.CreateReadWrite("other", "base", storage("size=8m")))
		path, put := get(t, d, "box")
		if err := write0(path+"/big", 12<<20); !full(err) {
			t.Fatalf("12 MiB into 8: %v", err)
		}
		must(t, d.Resize("box", map[string]string{"SIZE": "32m"}))
		wantLimits(t, d, "box", 32<<20, 60)
		must(t, write0(path+"/big", 12<<20))
		must(t, d.Resize("box", map[string]string{"inodes": "20"}))
		wantLimits(t, d, "box", 32<<20, 20)
		var err error
		for i := 0; i < 40 && err == nil; i++ {
			err = os.WriteFile(fmt.Sprintf("%s/f%d", path, i), nil, 0o644)
		}
		if !full(err) {
			t.Errorf("40 files into 20 inodes: %v", err)
		}
		must(t, d.Resize("box", map[string]string{"size": "16M", "inodes": "100"}))
		if err := write0(path+"/more", 8<<20); !full(err) {
			t.Errorf("20 MiB into 16: %v", err)
		}
		put()
		wantLimits(t, d, "other", 8<<20, 0)
		// Another Driver sees them, and limits end with the layer as ever.
		next := openTestDriver(t, home, Options{})
		wantLimits(t, next, "box", 16<<20, 100)
		id := projectOf(t, home+"/box")
		must(t, errors.Join(d.Remove("box"), d.Cleanup()))
		wantReused(t, d, id, "after Remove")
	})
}

// TestResizeLifts: "none" lifts one limit or both, for a mounted layer too; its usage is still known without a
// walk, nobody else gets its project, and it can be limited again.
func TestResizeLifts(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{Size: 8 << 20})
		must(t, d.Create("base", "", nil))
		must(t, d.CreateReadWrite("box", "base", storage("inodes=60")))
		path, put := get(t, d, "box")
		defer put()
		must(t, d.Resize("box", map[string]string{"inodes": "none"}))
		wantLimits(t, d, "box", 8<<20, 0)
		must(t, d.Resize("box", map[string]string{"size": "none"}))
		wantLimits(t, d, "box", 0, 0)
		must(t, write0(path+"/big", 12<<20))
		for i := range 80 {
			must(t, os.WriteFile(fmt.Sprintf("%s/f%d", path, i), nil, 0o644))
		}
		if _, has, err := d.quota.Get(home + "/box"); err != nil || has.Bytes < 12<<20 || has.Inodes < 80 {
			t.Errorf("usage %+v: %v", has, err)
		}
		id := projectOf(t, home+"/box")
		must(t, d.CreateReadWrite("other", "base", nil))
		if projectOf(t, home+"/other") == id || projectOf(t, path+"/big") != id {
			t.Errorf("projects %d, of the file %d, of another layer %d", id, projectOf(t, path+"/big"), projectOf(t, home+"/other"))
		}
		wantErr(t, d.Resize("box", map[string]string{"size": "8m"}), quota.ErrBelowUsage)
		must(t, d.Resize("box", map[string]string{"size": "16m", "inodes": "200"}))
		wantLimits(t, d, "box", 16<<20, 200)
		if err := write0(path+"/more", 8<<20); !full(err) {
			t.Errorf("20 MiB into 16: %v", err)
		}
		// One that was never limited, in spite of the default, has none to lift.
		must(t, d.CreateReadWrite("free", "base", storage("size=none")))
		wantLimits(t, d, "free", 0, 0)
		if id := projectOf(t, home+"/free"); id != 0 {
			t.Errorf("project %d", id)
		}
		wantErr(t, d.Resize("free", map[string]string{"size": "none"}), ErrNotSupported)
	})
}

// TestResizeSoft: a soft limit that is the hard one, as Docker sets it, goes with it; one that an
// administrator has set stays, and is not left above the hard one.
func TestResizeSoft(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{})
		must(t, d.CreateReadWrite("box", "", storage("size=8m", "inodes=60")))
		dir := home + "/box"
		for _, c := range []struct {
			soft, want quota.Limits
			size       string
			err        error
		}{
			{soft: quota.Limits{Bytes: 8 << 20, SoftBytes: 8 << 20}, size: "16m", want: quota.Limits{Bytes: 16 << 20}},
			{soft: quota.Limits{Bytes: 8 << 20, SoftBytes: 8 << 20}, size: "4m", want: quota.Limits{Bytes: 4 << 20}},
			{soft: quota.Limits{Bytes: 8 << 20, SoftBytes: 8 << 20}, size: "none", want: quota.Limits{}},
			{soft: quota.Limits{Bytes: 8 << 20, SoftBytes: 6 << 20}, size: "16m", want: quota.Limits{Bytes: 16 << 20, SoftBytes: 6 << 20}},
			{soft: quota.Limits{Bytes: 8 << 20, SoftBytes: 6 << 20}, size: "none", want: quota.Limits{SoftBytes: 6 << 20}},
			{soft: quota.Limits{Bytes: 8 << 20, SoftBytes: 6 << 20}, size: "4m", err: quota.ErrInvalidLimit},
		} {
			must(t, d.quota.Resize(dir, c.soft))
			err := d.Resize("box", map[string]string{"size": c.size})
			if c.err != nil {
				c.want = c.soft
				wantErr(t, err, c.err)
			} else {
				must(t, err)
			}
			if got, _, err := d.quota.Get(dir); err != nil || got != c.want {
				t.Errorf("%+v to %s: %+v, want %+v: %v", c.soft, c.size, got, c.want, err)
			}
		}
	})
}

// TestResizeBad: an error each, and the limits are what they were.
func TestResizeBad(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{})
		must(t, d.Create("base", "", nil))
		must(t, d.CreateReadWrite("box", "base", storage("size=8m", "inodes=60")))
		must(t, d.CreateReadWrite("free", "base", nil))
		path, put := get(t, d, "box")
		defer put()
		must(t, write0(path+"/f", 4<<20))
		for _, c := range []struct {
			opts map[string]string
			also error
		}{
			{nil, nil},
			{map[string]string{"size": "0"}, nil},
			{map[string]string{"size": "-1"}, nil},
			{map[string]string{"size": "1X"}, nil},
			{map[string]string{"size": ""}, nil},
			{map[string]string{"inodes": "0"}, nil},
			{map[string]string{"inodes": "-1"}, nil},
			{map[string]string{"inodes": "many"}, nil},
			{map[string]string{"colour": "red"}, nil},
			{map[string]string{"size": "16m", "Size": "32m"}, nil},
			{map[string]string{"size": "none", "inodes": "0"}, nil},
			{map[string]string{"size": "none", "inodes": "1"}, quota.ErrBelowUsage},
			{map[string]string{"size": "9000T"}, quota.ErrInvalidLimit},
			{map[string]string{"size": "1m"}, quota.ErrBelowUsage},
			{map[string]string{"inodes": "1"}, quota.ErrBelowUsage},
			// One is good, the other is not: neither is set.
			{map[string]string{"size": "16m", "inodes": "0"}, nil},
			{map[string]string{"size": "16m", "inodes": "1"}, quota.ErrBelowUsage},
			{map[string]string{"size": "1m", "inodes": "100"}, quota.ErrBelowUsage},
			{map[string]string{"size": "9000T", "inodes": "100"}, quota.ErrInvalidLimit},
		} {
			err := d.Resize("box", c.opts)
			wantErr(t, err, ErrInvalidOption)
			if c.also != nil {
				wantErr(t, err, c.also)
			}
			wantLimits(t, d, "box", 8<<20, 60)
		}
		must(t, write0(path+"/g", 1<<20)) // it is still of use
		good := map[string]string{"size": "16m"}
		err := d.Resize("free", good)
		wantErr(t, err, ErrNotSupported)
		wantErr(t, err, quota.ErrNoProject)
		wantErr(t, d.Resize("base", good), ErrNotSupported)
		wantLimits(t, d, "free", 0, 0)
		wantErr(t, d.Resize("none", good), ErrLayerNotFound)
		wantErr(t, d.Resize("../box", good), ErrInvalidID)
	})
}

// TestResizeAtOnce: of calls at the same time that change one limit each none is lost.
func TestResizeAtOnce(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		one := newTestDriver(t, home, Options{})
		must(t, one.CreateReadWrite("box", "", storage("size=8m", "inodes=60")))
		two := openTestDriver(t, home, Options{})
		for i := range 20 {
			var wg sync.WaitGroup
			errs := make([]error, 2)
			wg.Go(func() { errs[0] = one.Resize("box", map[string]string{"size": fmt.Sprint((i + 10) << 20)}) })
			wg.Go(func() { errs[1] = two.Resize("box", map[string]string{"inodes": fmt.Sprint(i + 100)}) })
			wg.Wait()
			must(t, errors.Join(errs...))
			wantLimits(t, one, "box", uint64(i+10)<<20, uint64(i+100))
		}
	})
}

// TestResizeWithoutQuota: bad options and missing layers are told apart from a filesystem without quotas.
func TestResizeWithoutQuota(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "tmpfs")
	home := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs", Size: 64 << 20})
	d := newTestDriver(t, home, Options{})
	must(t, d.CreateReadWrite("box", "", nil))
	wantErr(t, d.Resize("box", map[string]string{"size": "1m"}), ErrNotSupported)
	wantErr(t, d.Resize("box", map[string]string{"size": "0"}), ErrInvalidOption)
	wantErr(t, d.Resize("none", map[string]string{"size": "1m"}), ErrLayerNotFound)
	if u, err := d.Usage("box"); err != nil || u.MaxBytes != 0 {
		t.Errorf("%+v %v", u, err)
	}
}
