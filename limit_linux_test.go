package overlay2

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/quota"
	"golang.org/x/sys/unix"
)

// eachQuotaFS runs f on xfs and ext4 with project quotas.
func eachQuotaFS(t *testing.T, f func(t *testing.T, home string)) {
	for _, c := range []struct {
		need string
		fs   overlaytest.FS
	}{
		{"quota", overlaytest.FS{Name: "xfs", Options: "prjquota"}},
		{"quota-ext4", overlaytest.FS{Name: "ext4", Options: "prjquota", Mkfs: []string{"-O", "quota,project"}}},
	} {
		t.Run(c.fs.Name, func(t *testing.T) {
			overlaytest.Require(t, "root", "overlay", c.need)
			f(t, overlaytest.MountFS(t, c.fs))
		})
	}
}

func storage(options ...string) *CreateOpts {
	o := &CreateOpts{StorageOpt: map[string]string{}}
	for _, option := range options {
		key, value, _ := strings.Cut(option, "=")
		o.StorageOpt[key] = value
	}
	return o
}

func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// write0 writes and syncs a file of zeros.
func write0(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, size))
	return errors.Join(err, f.Sync(), f.Close())
}

// TestSizeLimit: the limit holds for root in the mount, for that layer alone, and can be read.
func TestSizeLimit(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{})
		apply(t, d, "base", "", makeTar(t, file("a", "1"), file("dir/", ""), file("dir/b", "2")))
		must(t, d.CreateReadWrite("box", "base", storage("SIZE=8m", "inodes=60")))
		must(t, d.CreateReadWrite("free", "base", nil))
		path, put := get(t, d, "box")
		must(t, errors.Join(os.Remove(path+"/a"), os.RemoveAll(path+"/dir"), os.Mkdir(path+"/dir", 0o755)))
		if err := write0(path+"/big", 16<<20); !full(err) {
			t.Errorf("16 MiB into 8: %v", err)
		}
		must(t, os.Remove(path+"/big"))
		must(t, write0(path+"/fits", 2<<20))
		made := 0
		for ; made < 100; made++ {
			if err := os.WriteFile(fmt.Sprintf("%s/f%d", path, made), nil, 0o644); err != nil {
				if !full(err) {
					t.Error(err)
				}
				break
			}
		}
		if made < 40 || made > 60 {
			t.Errorf("%d files fit into 60 inodes", made)
		}
		put()
		u, err := d.Usage("box")
		if err != nil || u.MaxBytes != 8<<20 || u.MaxInodes != 60 || u.Inodes < 50 || u.Inodes > 60 || u.Bytes < 2<<20 || u.Bytes > 8<<20 {
			t.Errorf("usage %+v: %v", u, err)
		}
		path, put = get(t, d, "free")
		must(t, write0(path+"/big", 16<<20))
		put()
		if u, err := d.Usage("free"); err != nil || u.MaxBytes != 0 || u.Bytes < 16<<20 {
			t.Errorf("usage without limits %+v: %v", u, err)
		}
		if got := tarNames(t, readDiff(t, d, "box", "base")); got[0] != ".wh.a" {
			t.Errorf("diff %q", got)
		}
	})
}

// TestDefaultLimits: they are for read-write layers only; a layer's own value replaces them.
func TestDefaultLimits(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{Size: 16 << 20, Inodes: 100})
		must(t, d.Create("base", "", nil))
		must(t, d.CreateReadWrite("box", "base", nil))
		must(t, d.CreateReadWrite("own", "base", storage("size=32M")))
		for id, want := range map[string][2]uint64{"base": {}, "box": {16 << 20, 100}, "own": {32 << 20, 100}} {
			if u, err := d.Usage(id); err != nil || u.MaxBytes != want[0] || u.MaxInodes != want[1] || u.Inodes < 2 {
				t.Errorf("%s: %+v %v", id, u, err)
			}
		}
	})
}

// TestLimitsEndWithTheLayer: what Remove, a failed Create or a crash leaves has no limits any more.
func TestLimitsEndWithTheLayer(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{})
		must(t, d.Create("base", "", nil))
		must(t, d.CreateReadWrite("box", "base", storage("size=8m")))
		id := projectOf(t, home+"/box")
		if id == 0 || projectOf(t, home+"/box/diff") != id || projectOf(t, home+"/box/work") != id || projectOf(t, home+"/base") != 0 {
			t.Errorf("projects %d %d %d", id, projectOf(t, home+"/box/diff"), projectOf(t, home+"/box/work"))
		}
		must(t, d.Remove("box"))
		must(t, d.Cleanup())
		wantReused(t, d, id, "after Remove")

		// A crash while a layer is made, and one while it is deleted.
		for _, name := range []string{"new-CRASH", "trash-CRASH"} {
			dir := filepath.Join(home, stagingDir, name)
			must(t, os.Mkdir(dir, 0o710))
			must(t, d.quota.Set(dir, quota.Limits{Bytes: 1 << 20}))
			must(t, os.Mkdir(dir+"/diff", 0o755))
			id := projectOf(t, dir)
			next := openTestDriver(t, home, Options{})
			must(t, next.Cleanup())
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is still there: %v", name, err)
			}
			wantReused(t, next, id, name)
		}
	})
}

// wantReused makes layers until one has the project, which shows that it was free again:
// xfs counts deleted inodes for a while.
func wantReused(t *testing.T, d *Driver, id uint32, when string) {
	t.Helper()
	for i := range 100 {
		name := fmt.Sprintf("%s%d", strings.ReplaceAll(when, " ", "-"), i)
		must(t, d.CreateReadWrite(name, "base", storage("size=1m")))
		if projectOf(t, filepath.Join(d.home, name)) == id {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("%s: project %d is not free", when, id)
}

// projectOf returns the project id of a file (FS_IOC_FSGETXATTR).
func projectOf(t *testing.T, path string) uint32 {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	request := uintptr(0x801c581f)
	if strings.HasPrefix(runtime.GOARCH, "ppc") || strings.HasPrefix(runtime.GOARCH, "mips") {
		request = 0x401c581f
	}
	var attr [7]uint32 // the fourth is the project
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&attr)))
	if errno != 0 {
		t.Fatal(errno)
	}
	return attr[3]
}

// TestApplyDiffHoldsTheLimit: root with CAP_SYS_RESOURCE could write past it on ext4.
func TestApplyDiffHoldsTheLimit(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{})
		must(t, d.Create("base", "", nil))
		big := tarEntry{tar.Header{Name: "big"}, strings.Repeat("x", 12<<20)}
		must(t, d.CreateReadWrite("box", "base", storage("size=8m")))
		err := errOf(d.ApplyDiff("box", "base", bytes.NewReader(makeTar(t, file("a", "x"), big))))
		if !full(err) {
			t.Fatalf("12 MiB into 8: %v", err)
		}
		_, err = d.Diff("box", "base")
		wantErr(t, err, ErrIncomplete)
		// Applied again, within the limit, which is still there.
		if size, err := d.ApplyDiff("box", "base", bytes.NewReader(makeTar(t, file("a", "x")))); err != nil || size != 1 {
			t.Errorf("size %d: %v", size, err)
		}
		must(t, d.Cleanup())
		if u, err := d.Usage("box"); err != nil || u.MaxBytes != 8<<20 {
			t.Errorf("%+v %v", u, err)
		}
		must(t, d.CreateReadWrite("few", "base", storage("inodes=20")))
		var many []tarEntry
		for i := range 100 {
			many = append(many, file(fmt.Sprint(i), ""))
		}
		if err := errOf(d.ApplyDiff("few", "base", bytes.NewReader(makeTar(t, many...)))); !full(err) {
			t.Errorf("100 files into 20 inodes: %v", err)
		}
		must(t, d.Remove("few"))
	})
}

// TestBadLimits: an error each, and no layer.
func TestBadLimits(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{})
		must(t, d.Create("base", "", nil))
		for _, option := range []string{"size=0", "size=-1", "size=1X", "size=9000T", "inodes=0", "inodes=-1", "inodes=many"} {
			wantErr(t, d.CreateReadWrite("box", "base", storage(option)), ErrInvalidOption)
			wantErr(t, d.Create("box", "base", storage(option)), ErrInvalidOption)
			if d.Exists("box") {
				t.Fatalf("%s made a layer", option)
			}
		}
		// Too little for the layer's own directories: all comes to nothing too.
		if err := d.CreateReadWrite("box", "base", storage("size=1")); err == nil {
			u, err := d.Usage("box")
			t.Logf("usage of a layer of one byte: %+v %v", u, err)
		} else if d.Exists("box") {
			t.Errorf("%v, but there is a layer", err)
		}
	})
}

// TestNoQuota: without project quotas a limit is an error that says how to get them; no
// limit is none.
func TestNoQuota(t *testing.T) {
	for fs, says := range map[string]string{"ext4": "prjquota", "tmpfs": "xfs or ext4"} {
		t.Run(fs, func(t *testing.T) {
			home := overlaytest.MountFS(t, overlaytest.FS{Name: fs, Size: 64 << 20})
			d := newTestDriver(t, home, Options{})
			must(t, d.CreateReadWrite("box", "", nil))
			err := d.CreateReadWrite("limited", "", storage("size=1m"))
			wantErr(t, err, ErrNotSupported)
			if !strings.Contains(err.Error(), says) || d.Exists("limited") {
				t.Errorf("error %q does not say %q", err, says)
			}
			if _, err := New(home, Options{Size: 1 << 20}); !errors.Is(err, ErrNotSupported) || !strings.Contains(err.Error(), says) {
				t.Errorf("New with a default size: %v", err)
			}
			if u, err := d.Usage("box"); err != nil || u.Inodes != 4 || u.MaxBytes != 0 {
				t.Errorf("usage %+v: %v", u, err)
			}
			_, err = d.Usage("none")
			wantErr(t, err, ErrLayerNotFound)
		})
	}
}

// TestNewWithManyQuotas: New looks for no layer, however many have limits: it does not even list the home. The
// times in the log are those with 10,000 limited layers, unless -short asks for fewer, and before there were any.
func TestNewWithManyQuotas(t *testing.T) {
	for _, c := range []struct {
		need string
		fs   overlaytest.FS
	}{
		{"quota", overlaytest.FS{Name: "xfs", Size: 1 << 30, Options: "prjquota"}},
		{"quota-ext4", overlaytest.FS{Name: "ext4", Size: 1 << 30, Options: "prjquota", Mkfs: []string{"-O", "quota,project"}}},
	} {
		t.Run(c.fs.Name, func(t *testing.T) {
			overlaytest.Require(t, "root", "overlay", c.need)
			home := overlaytest.MountFS(t, c.fs) // of its own, as limits would outlive it
			must(t, unix.Mount("", filepath.Dir(home), "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_STRICTATIME, ""))
			d := newTestDriver(t, home, Options{Durability: DurabilityOff})
			without := newTime(t, home)
			n := 10000
			if testing.Short() {
				n = 200
			}
			start := time.Now()
			for i := range n {
				must(t, d.CreateReadWrite(fmt.Sprint("box", i), "", storage("size=1m")))
			}
			made := time.Since(start)
			wantLimits(t, d, fmt.Sprint("box", n-1), 1<<20, 0)
			listed := atime(t, home)
			with := newTime(t, home)
			if now := atime(t, home); now != listed {
				t.Errorf("New has listed the home, at %v", now)
			}
			_, err := os.ReadDir(home)
			must(t, err)
			if atime(t, home) == listed {
				t.Error("the time of access does not show who lists the home")
			}
			t.Logf("New took %v before there were %d layers with limits, made in %v, and %v with them", without, n, made, with)
		})
	}
}

// atime is when the content of a directory was last read.
func atime(t *testing.T, dir string) unix.Timespec {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(dir, &st))
	return st.Atim
}

// newTime is how long New takes: the least of several, as others use the processors too.
func newTime(t *testing.T, home string) time.Duration {
	t.Helper()
	least := time.Hour
	for range 10 {
		start := time.Now()
		d, err := New(home, Options{Durability: DurabilityOff, Size: 1 << 20})
		must(t, err)
		least = min(least, time.Since(start))
		must(t, d.Cleanup())
	}
	return least
}
