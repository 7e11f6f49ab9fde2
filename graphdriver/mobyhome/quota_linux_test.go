//go:build cgo

package mobyhome

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/quota"
	"github.com/moby/moby/v2/daemon/graphdriver"
	moby "github.com/moby/moby/v2/daemon/graphdriver/overlay2"
	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// quotaHome returns a directory on xfs with project quotas: where the guests of internal/vmtest have it.
func quotaHome(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("OVERLAY2_TEST_DIR_XFS")
	_, err := quota.Open(dir)
	if dir == "" || err != nil {
		overlaytest.Missing(t, "quota", fmt.Errorf("OVERLAY2_TEST_DIR_XFS is %q: %w", dir, err))
	}
	home, err := os.MkdirTemp(dir, "home-")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(home)) })
	return home
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// openMoby opens the home with moby's own driver, as a daemon does when it starts.
func openMoby(t *testing.T, home string) graphdriver.Driver {
	t.Helper()
	d, err := moby.Init(home, nil, user.IdentityMapping{})
	must(t, err)
	return d
}

func openOurs(t *testing.T, home string) *overlay2.Driver {
	t.Helper()
	d, err := overlay2.New(home, overlay2.Options{})
	must(t, err)
	return d
}

// project returns the project id of a directory (FS_IOC_FSGETXATTR).
func project(t *testing.T, path string) uint32 {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	var attr [7]uint32 // the fourth is the project
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 0x801c581f, uintptr(unsafe.Pointer(&attr))); errno != 0 {
		t.Fatal(errno)
	}
	return attr[3]
}

// fill writes so many MiB into a new file of a layer's tree.
func fill(path string, mib int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, mib<<20))
	return errors.Join(err, f.Sync(), f.Close())
}

func size(s string) *graphdriver.CreateOpts {
	return &graphdriver.CreateOpts{StorageOpt: map[string]string{"size": s}}
}

func wantSize(t *testing.T, d *overlay2.Driver, id string, max uint64) {
	t.Helper()
	if u, err := d.Usage(id); err != nil || u.MaxBytes != max || u.MaxInodes != 0 {
		t.Errorf("%s: %+v, want a limit of %d: %v", id, u, max, err)
	}
}

// mounted calls f with the layer mounted by either driver.
func mounted(t *testing.T, d interface {
	Get(id, label string) (string, error)
	Put(id string) error
}, id string, f func(path string)) {
	t.Helper()
	path, err := d.Get(id, "")
	must(t, err)
	f(path)
	must(t, d.Put(id))
}

// wantProjects fails if a layer has no project of its own, or one of two layers that another has too.
func wantProjects(t *testing.T, home string, ids ...string) {
	t.Helper()
	seen := make(map[uint32]string)
	for _, id := range ids {
		p := project(t, filepath.Join(home, id))
		if other, ok := seen[p]; ok || p == 0 {
			t.Errorf("%s has project %d, as %q", id, p, other)
		}
		for _, sub := range []string{"diff", "work"} {
			if q := project(t, filepath.Join(home, id, sub)); q != p {
				t.Errorf("%s/%s has project %d, the layer %d", id, sub, q, p)
			}
		}
		seen[p] = id
	}
}

// TestQuotaHomeOfOurs: moby's driver, opening a home of ours, leaves the limits of all layers alone, holds
// them, and gives its own layers other projects.
func TestQuotaHomeOfOurs(t *testing.T) {
	home := quotaHome(t)
	d := openOurs(t, home)
	must(t, d.Create("base", "", nil))
	ours := []string{"one", "two", "three"}
	for _, id := range ours {
		must(t, d.CreateReadWrite(id, "base", &overlay2.CreateOpts{StorageOpt: map[string]string{"size": "8m"}}))
	}
	must(t, d.Cleanup())
	m := openMoby(t, home)
	for _, id := range []string{"docker1", "docker2"} {
		must(t, m.CreateReadWrite(id, "base", size("12m")))
	}
	wantProjects(t, home, "one", "two", "three", "docker1", "docker2")
	for _, id := range ours {
		mounted(t, m, id, func(path string) {
			if err := fill(path+"/f", 10); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("10 MiB into 8 of %s: %v", id, err)
			}
		})
	}
	must(t, m.Remove("two")) // which leaves its limit behind, so that nobody gets its project
	d = openOurs(t, home)
	for _, id := range []string{"one", "three"} {
		wantSize(t, d, id, 8<<20)
		must(t, d.Resize(id, map[string]string{"size": "16m"}))
	}
	must(t, d.CreateReadWrite("four", "base", &overlay2.CreateOpts{StorageOpt: map[string]string{"size": "8m"}}))
	wantProjects(t, home, "one", "three", "four", "docker1", "docker2")
	end(t, d, "one", "three", "four", "docker1", "docker2", "base")
}

// TestQuotaHomeOfMoby: what moby's driver has limited is read right here, can be resized and lifted, keeps its
// project, and its limits end with it; moby finds it so again.
func TestQuotaHomeOfMoby(t *testing.T) {
	home := quotaHome(t)
	m := openMoby(t, home)
	must(t, m.Create("base", "", nil))
	for _, id := range []string{"docker1", "docker2", "docker3"} {
		must(t, m.CreateReadWrite(id, "base", size("8m")))
	}
	must(t, m.CreateReadWrite("free", "base", nil))
	mounted(t, m, "docker1", func(path string) { must(t, fill(path+"/f", 4)) })
	must(t, m.Cleanup())

	d := openOurs(t, home)
	for _, id := range []string{"docker1", "docker2", "docker3"} {
		wantSize(t, d, id, 8<<20)
	}
	wantSize(t, d, "free", 0)
	if u, err := d.Usage("docker1"); err != nil || u.Bytes < 4<<20 || u.Bytes > 5<<20 {
		t.Errorf("%+v %v", u, err)
	}
	if err := d.Resize("docker1", map[string]string{"size": "2m"}); !errors.Is(err, quota.ErrBelowUsage) {
		t.Errorf("below usage: %v", err)
	}
	must(t, d.Resize("docker1", map[string]string{"size": "32m"}))
	must(t, d.Resize("docker2", map[string]string{"size": "4m"}))
	must(t, d.Resize("docker3", map[string]string{"size": "none"}))
	mounted(t, d, "docker1", func(path string) {
		must(t, fill(path+"/g", 20))
		if err := fill(path+"/h", 20); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("44 MiB into 32: %v", err)
		}
	})
	must(t, d.CreateReadWrite("ours", "base", &overlay2.CreateOpts{StorageOpt: map[string]string{"size": "8m"}}))
	wantProjects(t, home, "docker1", "docker2", "docker3", "ours")
	must(t, errors.Join(d.Cleanup()))

	m = openMoby(t, home)
	must(t, m.CreateReadWrite("docker4", "base", size("8m")))
	mounted(t, m, "docker3", func(path string) { must(t, fill(path+"/f", 20)) })
	mounted(t, m, "docker2", func(path string) {
		if err := fill(path+"/f", 6); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("6 MiB into 4: %v", err)
		}
	})
	wantProjects(t, home, "docker1", "docker2", "docker3", "docker4", "ours")
	d = openOurs(t, home)
	wantSize(t, d, "docker2", 4<<20)
	wantSize(t, d, "docker3", 0)
	wantSize(t, d, "docker4", 8<<20)
	end(t, d, "docker1", "docker2", "docker3", "docker4", "free", "ours", "base")
}

// end looks for problems, and removes the layers with their limits.
func end(t *testing.T, d *overlay2.Driver, ids ...string) {
	t.Helper()
	if problems, err := d.Check(); err != nil || len(problems) > 0 {
		t.Errorf("check: %v %v", problems, err)
	}
	for _, id := range ids {
		must(t, d.Remove(id))
	}
	must(t, d.Cleanup())
}
