package overlay2

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// sharedDir returns a directory on a mount that propagates.
func sharedDir(t *testing.T) string {
	t.Helper()
	overlaytest.Require(t, "root", "overlay", "tmpfs")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	must(t, unix.Mount("shared", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { must(t, sys.UnmountBelow(dir)) })
	must(t, unix.Mount("", dir, "", unix.MS_SHARED, ""))
	return dir
}

// mountsAt returns how many mounts lie at path.
func mountsAt(t *testing.T, path string) (n int) {
	t.Helper()
	must(t, sys.MountPoints(func(m sys.MountPoint) {
		if m.Path == path {
			n++
		}
	}))
	return n
}

// wantBound fails the test unless the home is, or is not, mounted on itself, and as many records lie in staging.
func wantBound(t *testing.T, home string, mounts int) {
	t.Helper()
	if n := mountsAt(t, home); n != mounts {
		t.Errorf("%d mounts at the home, want %d", n, mounts)
	}
	if records, err := filepath.Glob(home + "/staging/" + boundPrefix + "*"); err != nil || len(records) != mounts {
		t.Errorf("records %v, want %d, %v", records, mounts, err)
	}
}

const bindEnv = "OVERLAY2_TEST_BIND"

// TestHomeBindWorker opens a home, gets a layer if there is one, and waits to be killed.
func TestHomeBindWorker(t *testing.T) {
	home := os.Getenv(bindEnv)
	if home == "" {
		return // run as a test of its own, it has nothing to do
	}
	d, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	if d.Exists("box") {
		_, err = d.Get("box", "")
		must(t, err)
	}
	fmt.Fprintln(os.Stdout, "ready")
	_, _ = os.Stdin.Read(make([]byte, 1))
	must(t, d.Cleanup())
}

// startBindWorker starts a process that uses the home, and returns what kills it and what ends it.
func startBindWorker(t *testing.T, home string) (kill, end func()) {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.Command(exe, "-test.run=^TestHomeBindWorker$")
	cmd.Env = append(os.Environ(), bindEnv+"="+home)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	buf := make([]byte, 6)
	if _, err := out.Read(buf); err != nil || string(buf) != "ready\n" {
		t.Fatalf("%q %v", buf, err)
	}
	return func() {
			must(t, cmd.Process.Kill())
			_, _ = out.Read(make([]byte, 1<<10))
			_ = cmd.Wait() // it says killed
		}, func() {
			must(t, in.Close())
			for buf := make([]byte, 1<<10); ; {
				if _, err := out.Read(buf); err != nil {
					break
				}
			}
			must(t, cmd.Wait())
		}
}

// TestHomeBindKilled: what a killed process has mounted the home on is known again, used, and undone by the last Cleanup, so that
// the home can be renamed; with a layer mounted in it too.
func TestHomeBindKilled(t *testing.T) {
	for _, mounted := range []bool{false, true} {
		t.Run(fmt.Sprint(mounted), func(t *testing.T) {
			dir := sharedDir(t)
			home := dir + "/home"
			if mounted {
				d := openTestDriver(t, home, Options{})
				must(t, d.Create("base", "", nil))
				must(t, d.CreateReadWrite("box", "base", nil))
				must(t, d.Cleanup())
			}
			kill, _ := startBindWorker(t, home)
			kill()
			wantBound(t, home, 1)
			d := openTestDriver(t, home, Options{})
			wantBound(t, home, 1)
			if mounted {
				must(t, d.Cleanup())
				wantBound(t, home, 1)
				must(t, errOf2(d.Get("box", "")))
				must(t, d.Put("box"))
				must(t, d.Put("box")) // the dead process's use is one
			}
			must(t, d.Cleanup())
			wantBound(t, home, 0)
			must(t, os.Rename(home, dir+"/renamed"))
			must(t, os.Rename(dir+"/renamed", home))
		})
	}
}

// TestHomeBindShared: of several Drivers and processes the last one that ends undoes the mount.
func TestHomeBindShared(t *testing.T) {
	dir := sharedDir(t)
	home := dir + "/home"
	d := openTestDriver(t, home, Options{})
	other := openTestDriver(t, home, Options{})
	_, end := startBindWorker(t, home)
	wantBound(t, home, 1)
	must(t, d.Cleanup())
	wantBound(t, home, 1)
	end()
	wantBound(t, home, 1)
	kill, _ := startBindWorker(t, home)
	must(t, other.Cleanup())
	wantBound(t, home, 1)
	kill()
	must(t, other.Cleanup())
	wantBound(t, home, 0)
	if problems, err := CheckHome(home); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
}

// TestHomeBindForeign: what somebody else has mounted at the home is made private and never unmounted.
func TestHomeBindForeign(t *testing.T) {
	for name, mount := range map[string]func(home string) error{
		"filesystem": func(home string) error { return unix.Mount("foreign", home, "tmpfs", 0, "mode=710") },
		"bind":       func(home string) error { return unix.Mount(home, home, "", unix.MS_BIND, "") },
		"private bind": func(home string) error {
			if err := unix.Mount(home, home, "", unix.MS_BIND, ""); err != nil {
				return err
			}
			return unix.Mount("", home, "", unix.MS_PRIVATE, "")
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := sharedDir(t)
			home := dir + "/home"
			must(t, os.Mkdir(home, 0o710))
			must(t, mount(home))
			// The record of another mount, and of one before the machine stopped.
			must(t, os.Mkdir(home+"/staging", 0o700))
			must(t, os.Symlink("before", home+"/staging/bound-1"))
			d := openTestDriver(t, home, Options{})
			must(t, d.Create("base", "", nil))
			must(t, d.Cleanup())
			if n := mountsAt(t, home); n != 1 {
				t.Errorf("%d mounts", n)
			}
			var shared []string
			must(t, sys.MountPoints(func(m sys.MountPoint) {
				if m.Shared && m.Path == home {
					shared = append(shared, m.Path)
				}
			}))
			if shared != nil {
				t.Errorf("propagate: %v", shared)
			}
		})
	}
}

// TestHomeBindRecords: records of former mounts go, and one that is there under the number of a new mount is not believed.
func TestHomeBindRecords(t *testing.T) {
	dir := sharedDir(t)
	home := dir + "/home"
	d := openTestDriver(t, home, Options{})
	must(t, d.Cleanup())
	for i := range 2000 { // any number that the next mount can have
		must(t, os.Symlink("before", fmt.Sprintf("%s/staging/bound-%d", home, i)))
	}
	d = openTestDriver(t, home, Options{})
	wantBound(t, home, 1)
	must(t, d.Cleanup())
	wantBound(t, home, 0)
}

// TestHomeBindRace: processes that begin and end at the same time mount the home once, and none is left with a home that propagates.
func TestHomeBindRace(t *testing.T) {
	dir := sharedDir(t)
	home := dir + "/home"
	must(t, openTestDriver(t, home, Options{}).Cleanup())
	done := make(chan error, 4)
	for range 4 {
		go func() {
			for range 25 {
				d, err := New(home, quietOptions(DurabilityOff))
				if err != nil {
					done <- err
					return
				}
				if n := homeMounts(home); !slices.Equal(n, []string{"private"}) {
					done <- fmt.Errorf("mounts at the home: %v", n)
					return
				}
				if err := d.Cleanup(); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range 4 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	wantBound(t, home, 0)
}

func homeMounts(home string) (all []string) {
	err := sys.MountPoints(func(m sys.MountPoint) {
		if m.Path == home {
			all = append(all, map[bool]string{true: "shared", false: "private"}[m.Shared])
		}
	})
	if err != nil {
		all = append(all, err.Error())
	}
	return all
}

// TestHomeBindInUse: New covers no mount that is in use, where the mount of the home has begun to propagate since.
func TestHomeBindInUse(t *testing.T) {
	dir := sharedDir(t)
	must(t, unix.Mount("", dir, "", unix.MS_PRIVATE, ""))
	home := dir + "/home"
	d, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	deepChain(t, d, 3)
	must(t, d.CreateReadWrite("box", "layer2", nil))
	path, err := d.Get("box", "")
	must(t, err)
	must(t, unix.Mount("", dir, "", unix.MS_SHARED, ""))
	other, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	wantChain(t, path, 3)
	wantBound(t, home, 0)
	must(t, d.Put("box"))
	if n := mountsAt(t, path); n != 0 {
		t.Errorf("%d mounts after Put", n)
	}
	later, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	wantBound(t, home, 1)
	for range 4 { // beneath the mount that lies over the one that d knows
		path, err = d.Get("box", "")
		must(t, err)
		wantChain(t, path, 3)
		if n := mountsAt(t, path); n != 1 {
			t.Errorf("%d mounts after Get", n)
		}
		must(t, d.Put("box"))
		if n := mountsAt(t, path); n != 0 {
			t.Errorf("%d mounts after Put", n)
		}
	}
	must(t, errors.Join(other.Cleanup(), d.Cleanup(), later.Cleanup()))
	wantBound(t, home, 0)
}
