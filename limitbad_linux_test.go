package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/quota"
	"golang.org/x/sys/unix"
)

// namesIn lists what lies in a home, two levels deep.
func namesIn(t *testing.T, home string) string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"/*", "/*/*"} {
		found, err := filepath.Glob(home + pattern)
		must(t, err)
		all = append(all, found...)
	}
	return strings.Join(all, "\n")
}

// TestLimitsReadOnly: on a filesystem that is read-only no layer is made and no limit changed, and what there
// is can be read; it is all the same when it can be written again.
func TestLimitsReadOnly(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{})
		must(t, d.Create("base", "", nil))
		must(t, d.CreateReadWrite("box", "base", storage("size=8m", "inodes=60")))
		must(t, d.Cleanup())
		before := namesIn(t, home)
		must(t, unix.Mount(home, home, "", unix.MS_BIND, ""))
		err := unix.Mount("", home, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
		wantErr(t, d.CreateReadWrite("new", "base", storage("size=8m")), unix.EROFS)
		for _, o := range []map[string]string{{"size": "16m"}, {"size": "none", "inodes": "none"}} {
			wantErr(t, d.Resize("box", o), unix.EROFS)
		}
		wantLimits(t, d, "box", 8<<20, 60)
		if _, err := New(home, Options{Size: 1 << 20}); !errors.Is(err, unix.EROFS) {
			t.Errorf("New: %v", err)
		}
		must(t, errors.Join(err, unix.Unmount(home, unix.MNT_DETACH)))
		if after := namesIn(t, home); after != before {
			t.Errorf("the home held\n%s\nand holds\n%s", before, after)
		}
		must(t, d.Resize("box", map[string]string{"size": "16m"}))
		wantLimits(t, d, "box", 16<<20, 60)
	})
}

// TestLimitsForeignProject: a project that somebody else on the filesystem uses, as one with another home or an
// administrator, is no layer's, and its limits stay when layers come and go.
func TestLimitsForeignProject(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, dir string) {
		must(t, os.Mkdir(dir+"/theirs", 0o755))
		theirs, err := quota.Open(dir)
		must(t, err)
		want := quota.Limits{Bytes: 8 << 20, Inodes: 9}
		must(t, theirs.Set(dir+"/theirs", want))
		taken := projectOf(t, dir+"/theirs")
		d := newTestDriver(t, dir+"/home", Options{})
		for i := range 4 {
			id := fmt.Sprint("box", i)
			must(t, d.CreateReadWrite(id, "", storage("size=16m")))
			if p := projectOf(t, d.home+"/"+id); p == taken || p == 0 {
				t.Errorf("%s has project %d, theirs is %d", id, p, taken)
			}
		}
		for i := range 4 {
			must(t, d.Remove(fmt.Sprint("box", i)))
		}
		must(t, d.Cleanup())
		if got, _, err := theirs.Get(dir + "/theirs"); err != nil || got != want {
			t.Errorf("limits %+v: %v", got, err)
		}
		must(t, theirs.Clear(dir+"/theirs"))
	})
}

// TestLimitsBelowUsage: a layer that is filled, and one byte less than it takes.
func TestLimitsBelowUsage(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{})
		must(t, d.Create("base", "", nil))
		must(t, d.CreateReadWrite("box", "base", storage("size=8m", "inodes=60")))
		must(t, write0(home+"/box/diff/f", 4<<20))
		u, err := d.Usage("box")
		must(t, err)
		for _, o := range []map[string]string{
			{"size": fmt.Sprint(u.Bytes - 512)}, {"inodes": fmt.Sprint(u.Inodes - 1)},
			{"size": "none", "inodes": fmt.Sprint(u.Inodes - 1)}, {"size": fmt.Sprint(u.Bytes - 512), "inodes": "none"},
		} {
			err := d.Resize("box", o)
			wantErr(t, err, ErrInvalidOption)
			wantErr(t, err, quota.ErrBelowUsage)
			wantLimits(t, d, "box", 8<<20, 60)
		}
		must(t, d.Resize("box", map[string]string{"size": fmt.Sprint(u.Bytes), "inodes": fmt.Sprint(u.Inodes)}))
		if err := os.WriteFile(home+"/box/diff/one", nil, 0o644); err == nil {
			// root passes a limit of ext4, outside of a mount.
			if u, err = d.Usage("box"); err != nil || u.Inodes <= u.MaxInodes {
				t.Errorf("%+v %v", u, err)
			}
		} else if !full(err) {
			t.Error(err)
		}
	})
}

// limitHomeEnv makes TestLimitsUserns the half of itself that runs in a user namespace.
const limitHomeEnv = "OVERLAY2_TEST_LIMIT_HOME"

// TestLimitsUserns: in a user namespace the kernel allows no quotas; the error says so, nothing is made, and
// the same home serves without limits.
func TestLimitsUserns(t *testing.T) {
	if home := os.Getenv(limitHomeEnv); home != "" {
		_, err := New(home, Options{Size: 1 << 20})
		wantUserns(t, err)
		if got, err := os.ReadDir(home); err != nil || len(got) > 0 {
			t.Errorf("New left %v: %v", got, err)
		}
		d := newTestDriver(t, home, Options{})
		must(t, d.Create("base", "", nil))
		before := namesIn(t, home)
		wantUserns(t, d.CreateReadWrite("box", "base", storage("size=8m")))
		wantUserns(t, d.CreateReadWrite("box", "base", storage("inodes=8")))
		wantUserns(t, d.Resize("base", map[string]string{"size": "8m"}))
		if after := namesIn(t, home); after != before {
			t.Errorf("the home held\n%s\nand holds\n%s", before, after)
		}
		must(t, d.CreateReadWrite("box", "base", storage("size=none")))
		wantLimits(t, d, "box", 0, 0)
		return
	}
	eachQuotaFS(t, func(t *testing.T, home string) {
		overlaytest.Require(t, "userns")
		must(t, os.Mkdir(home+"/home", 0o755))
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestLimitsUserns$", "-test.v")
		cmd.Env = append(os.Environ(), limitHomeEnv+"="+home+"/home", "TMPDIR="+home)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: ids, GidMappings: ids}
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestLimitsUserns")) {
			t.Errorf("%v: %s", err, out)
		}
	})
}

func wantUserns(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrNotSupported) || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "user namespace") {
		t.Errorf("error %v", err)
	}
}

// TestLimitDigests: digests count against a layer's limits, and an apply that has no room for them is not taken for one that ended well.
func TestLimitDigests(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, home string) {
		d := newTestDriver(t, home, Options{RecordDigests: true})
		must(t, d.CreateReadWrite("box", "", storage("size=1m")))
		var entries []tarEntry
		for i := range 9000 {
			entries = append(entries, file(fmt.Sprintf("a-long-name-a-long-name-a-long-name/%d", i), ""))
		}
		_, err := d.ApplyDiff("box", "", bytes.NewReader(makeTar(t, entries...)))
		u, err2 := d.Usage("box")
		must(t, err2)
		if err == nil || u.Bytes > u.MaxBytes && !errors.Is(err, unix.EDQUOT) {
			t.Errorf("%v, %+v", err, u)
		}
		must(t, d.Remove("box")) // which Check tells of
	})
}

// TestLimitedPowerCut: after a power cut New writes the files of a layer with limits again, though it takes nothing from elsewhere;
// one whose limit is used up does not keep it from opening the home.
func TestLimitedPowerCut(t *testing.T) {
	eachQuotaFS(t, func(t *testing.T, dir string) {
		for _, full := range []bool{false, true} {
			home := fmt.Sprint(dir, "/", full)
			d, err := New(home, quietOptions(DurabilityBackground))
			must(t, err)
			must(t, errors.Join(d.Create("base", "", nil), d.Sync(), d.CreateReadWrite("box", "base", storage("size=8m"))))
			failUnsynced(t, d)
			must(t, errors.Join(os.Truncate(home+"/box/link", 0), os.Truncate(home+"/box/lower", 0)))
			if full {
				overlaytest.WithoutCap(t, unix.CAP_SYS_RESOURCE, func() {
					for i, size := range []int{1 << 20, 4096, 1} {
						for j := 0; os.WriteFile(fmt.Sprintf("%s/box/diff/%d-%d", home, i, j), make([]byte, size), 0o600) == nil; j++ {
						}
					}
				})
			}
			_ = d.Cleanup() // nothing more can be synced
			d, err = New(home, quietOptions(DurabilityBackground))
			must(t, err)
			if !full {
				getPut(t, d, "box", 1)
			}
			must(t, d.Cleanup())
		}
	})
}
