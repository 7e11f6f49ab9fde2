package overlay2

import (
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// TestVolatile: a layer mounted with volatile can be used by its Driver as any other. For the
// next process it may be what a crash left, until somebody says that it is not.
func TestVolatile(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	for _, method := range methods(t) {
		t.Run(method.String(), func(t *testing.T) {
			opts := Options{MountOptions: []string{"volatile"}, MountMethod: method}
			d := newTestDriver(t, t.TempDir(), opts)
			if got := statusOf(d, "Mount Options"); !strings.Contains(got, "volatile") {
				t.Errorf("Status says %q", got)
			}
			deepChain(t, d, 2)
			must(t, d.CreateReadWrite("box", "layer1", nil))
			for range 3 {
				path, put := get(t, d, "box")
				must(t, os.WriteFile(path+"/f", nil, 0o600))
				put()
			}
			if _, err := os.Stat(d.home + "/box/" + volatileMark); err != nil {
				t.Fatalf("the kernel makes no mark: %v", err)
			}
			_, err := d.DiffSize("box", "layer1")
			must(t, err)

			for _, next := range []*Driver{openTestDriver(t, d.home, opts), openTestDriver(t, d.home, Options{MountMethod: method})} {
				_, err = next.Get("box", "")
				wantErr(t, err, ErrUnsynced)
				_, err = next.Mount("box", MountOpts{})
				wantErr(t, err, ErrUnsynced)
				_, err = next.DiffSize("box", "layer1")
				wantErr(t, err, ErrUnsynced)
				_, err = next.Diff("box", "layer1")
				wantErr(t, err, ErrUnsynced)
				wantErr(t, next.Create("child", "box", nil), ErrUnsynced)
				if _, err := os.Lstat(d.home + "/box/merged"); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("merged: %v", err)
				}
			}
			next := openTestDriver(t, d.home, opts)
			wantProblem(t, next, "box/"+volatileMark, ErrUnsynced)
			wantNoProblem(t, d)
			must(t, next.ResetVolatile("box"))
			must(t, next.ResetVolatile("box"))
			wantNoProblem(t, next)
			path, put := get(t, next, "box")
			if _, err := os.Stat(path + "/f"); err != nil {
				t.Error(err)
			}
			if problems, err := CheckHome(d.home); err != nil || len(problems) > 0 {
				t.Errorf("mounted: %v %v", problems, err)
			}
			wantErr(t, next.ResetVolatile("box"), ErrLayerInUse)
			put()
			wantErr(t, next.ResetVolatile("none"), ErrLayerNotFound)

			// A mount that is adopted is alive: nothing has crashed.
			_, err = next.Get("box", "")
			must(t, err)
			die(next)
			last := openTestDriver(t, d.home, opts)
			must(t, last.Put("box"))
			_, put = get(t, last, "box")
			put()

			// What is unsynced can be removed, and its name used again.
			must(t, d.Remove("box"))
			must(t, d.Create("box", "layer1", nil))
			_, put = get(t, d, "box")
			put()
			must(t, d.ResetVolatile("box")) // or Check by the other Drivers finds it
		})
	}
}

// TestMountOptions: options reach the kernel, whichever way it is told.
func TestMountOptions(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	for _, method := range methods(t) {
		for option, shown := range map[string]string{"redirect_dir=on": "redirect_dir=on", "metacopy=on": "metacopy=on", "xino=on": "xino=on", "volatile": "volatile", "index=on": "index=on"} {
			t.Run(method.String()+"/"+option, func(t *testing.T) {
				d := newTestDriver(t, t.TempDir(), Options{MountOptions: []string{option}, MountMethod: method})
				deepChain(t, d, 2)
				must(t, d.CreateReadWrite("box", "layer1", nil))
				_, put := get(t, d, "box")
				defer put()
				mounts, err := os.ReadFile("/proc/self/mountinfo")
				must(t, err)
				for line := range strings.Lines(string(mounts)) {
					if strings.Contains(line, d.home+"/box/merged") && !strings.Contains(line, shown) {
						t.Errorf("not shown: %s", line)
					}
				}
				if got := statusOf(d, "Mount Options"); !strings.Contains(got, option) {
					t.Errorf("Status says %q", got)
				}
			})
		}
	}
}

// TestRefusedOption: options that the kernel refuses together (nfs_export wants index) are named, and
// nothing else is blamed.
func TestRefusedOption(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	_, err := New(t.TempDir()+"/home", Options{MountOptions: []string{"xino=on", "nfs_export=on"}})
	if err == nil || errors.Is(err, ErrIncompatibleFS) || !errors.Is(err, ErrNotSupported) || !errors.Is(err, unix.EINVAL) {
		t.Errorf("got %v", err)
	}
	f := facts{userxattr: true}
	if err := f.checkUserOptions([]string{"xino=on", "metacopy=on"}); !errors.Is(err, ErrInvalidOption) {
		t.Errorf("got %v", err)
	}
}

// TestMountLabelled: with SELinux on the label is the mount's, commas and all, whichever way it is mounted,
// as a view and as data too.
func TestMountLabelled(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "selinux")
	const label = "system_u:object_r:container_file_t:s0:c1,c2"
	labelled := func(t *testing.T, path string) {
		t.Helper()
		buf := make([]byte, 256)
		n, err := unix.Lgetxattr(path+"/f0", "security.selinux", buf)
		must(t, err)
		if got := strings.TrimRight(string(buf[:n]), "\x00"); got != label {
			t.Errorf("%s is labelled %q", path, got)
		}
	}
	for _, method := range methods(t) {
		t.Run(method.String(), func(t *testing.T) {
			d := newTestDriver(t, t.TempDir(), Options{MountMethod: method})
			deepChain(t, d, 2)
			must(t, d.CreateReadWrite("box", "layer1", nil))
			path, err := d.Get("box", label)
			must(t, err)
			labelled(t, path)
			must(t, d.Put("box"))
			m, err := d.Mount("layer1", MountOpts{Label: label})
			must(t, err)
			labelled(t, m.Path())
			must(t, m.Close())
			data, err := d.MountData("box", label)
			must(t, err)
			at := t.TempDir()
			must(t, unix.Mount(data.Source, at, data.Type, 0, strings.Join(data.Options, ",")))
			labelled(t, at)
			must(t, unix.Unmount(at, 0))
		})
	}
}

// wantProblem fails the test unless a problem at path is all that Check returns.
func wantProblem(t *testing.T, d *Driver, path string, want error) {
	t.Helper()
	problems, err := d.Check()
	must(t, err)
	if len(problems) != 1 || problems[0].Path != path || !errors.Is(problems[0].Err, want) {
		t.Errorf("Check: %v, want %s: %v", problems, path, want)
	}
}

func wantNoProblem(t *testing.T, d *Driver) {
	t.Helper()
	if problems, err := d.Check(); err != nil || len(problems) > 0 {
		t.Errorf("Check: %v %v", problems, err)
	}
}

// TestResetVolatileRace: the mark of a mount that lives is not taken away by another Driver that accepts what was there before.
func TestResetVolatileRace(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	opts := quietOptions(DurabilityOff)
	opts.MountOptions = []string{"volatile"}
	d, err := New(t.TempDir(), opts)
	must(t, err)
	other, err := New(d.home, opts)
	must(t, err)
	must(t, d.CreateReadWrite("box", deepChain(t, d, 2), nil))
	getPut(t, d, "box", 1)
	// Out of sight, as in another mount namespace: only the lock tells.
	path, err := d.Get("box", "")
	must(t, err)
	must(t, unix.Unmount(path, unix.MNT_DETACH))
	wantErr(t, other.ResetVolatile("box"), ErrLayerInUse)
	must(t, d.Put("box"))
	must(t, other.ResetVolatile("box"))
	var ended atomic.Bool
	var all sync.WaitGroup
	all.Go(func() {
		for !ended.Load() {
			if err := other.ResetVolatile("box"); err != nil && !errors.Is(err, ErrLayerInUse) {
				t.Error(err)
				return
			}
		}
	})
	for range 500 {
		_, err := d.Get("box", "")
		must(t, err)
		if _, err := os.Lstat(d.home + "/box/" + volatileMark); err != nil {
			t.Error(err)
		}
		must(t, d.Put("box"))
	}
	ended.Store(true)
	all.Wait()
	must(t, errors.Join(other.Cleanup(), d.Cleanup()))
}

// TestVolatileMountFails: a mount that fails leaves the mark of what was written before, and the layer can be mounted again.
func TestVolatileMountFails(t *testing.T) {
	opts := quietOptions(DurabilityOff)
	opts.MountOptions = []string{"volatile"}
	d := newTestDriver(t, t.TempDir(), opts)
	must(t, d.CreateReadWrite("box", deepChain(t, d, 2), nil))
	getPut(t, d, "box", 1)
	for range 2 {
		var err error
		overlaytest.WithoutCap(t, unix.CAP_SYS_ADMIN, func() { _, err = d.Get("box", "") })
		wantErr(t, err, unix.EPERM)
		if _, err := os.Lstat(d.home + "/box/" + volatileMark); err != nil {
			t.Error(err)
		}
		next := openTestDriver(t, d.home, opts)
		_, err = next.Get("box", "")
		wantErr(t, err, ErrUnsynced)
		getPut(t, d, "box", 1)
	}
	must(t, d.ResetVolatile("box")) // or Check by the other Drivers finds it
}
