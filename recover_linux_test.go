package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/bcc2decd/overlay2/quota"
	"golang.org/x/sys/unix"
)

// TestRemoveCleanup: Removes and Cleanups of the same Driver at the same time.
func TestRemoveCleanup(t *testing.T) {
	d := newTestDriver(t, t.TempDir()+"/home", quietOptions(DurabilityOff))
	end := time.Now().Add(3 * time.Second)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for time.Now().Before(end) {
				id := "layer" + strconv.Itoa(i)
				if err := errors.Join(d.Create(id, "", nil), d.Remove(id), d.Cleanup()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
}

// dieUnsynced gives up what is recorded as not on the disk, as the end of the process does.
func dieUnsynced(d *Driver) {
	d.syncer.mu.Lock()
	defer d.syncer.mu.Unlock()
	if d.syncer.timer != nil {
		d.syncer.timer.Stop()
	}
	for _, b := range append(d.syncer.adopted, d.syncer.batch) {
		if b != nil {
			_ = sys.Close(b.fd)
		}
	}
	d.syncer.batch, d.syncer.adopted = nil, nil
}

// TestFilledAgainKilled: a layer with a child that lost its content in a power cut is filled again, and the process ends, or the disk is full,
// within the last steps of that. Its child cannot be mounted while it is incomplete, and in the end it is whole or can be filled.
func TestFilledAgainKilled(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	data := makeTar(t, file("a", "1"))
	for _, mode := range []Durability{DurabilityBackground, DurabilityStrict, DurabilityOff} {
		for _, killed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, killed=%v", mode, killed), func(t *testing.T) {
				overlaytest.NoLeaks(t)
				home := t.TempDir() + "/home"
				d, err := New(home, quietOptions(DurabilityBackground))
				must(t, err)
				apply(t, d, "low", "", data)
				must(t, d.CreateReadWrite("box", "low", nil))
				failUnsynced(t, d)
				_ = d.Cleanup() // nothing more can be synced
				d, err = New(home, quietOptions(mode))
				must(t, err)
				wantIncomplete := func() {
					t.Helper()
					_, err = d.Get("box", "")
					wantErr(t, err, ErrIncomplete)
				}
				wantIncomplete()
				if killed {
					fillAgainKilled(t, d, "low", data)
					wantIncomplete()
					dieUnsynced(d)
					d, err = New(home, quietOptions(mode))
					must(t, err)
				} else {
					// Nothing can be renamed to a link that lies on another mount.
					must(t, unix.Mount(home+"/l", home+"/l", "", unix.MS_BIND, ""))
					_, err := d.ApplyDiff("low", "", bytes.NewReader(data))
					wantErr(t, err, unix.EXDEV)
					must(t, unix.Unmount(home+"/l", unix.MNT_DETACH))
					_, err = d.Diff("low", "")
					wantErr(t, err, ErrIncomplete)
					wantIncomplete()
					_, err = d.ApplyDiff("low", "", bytes.NewReader(data))
					must(t, err)
				}
				path, err := d.Get("box", "")
				must(t, err)
				if b, err := os.ReadFile(path + "/a"); err != nil || string(b) != "1" {
					t.Errorf("%q %v", b, err)
				}
				must(t, errors.Join(d.Put("box"), d.Cleanup()))
				wantNoProblem(t, d)
			})
		}
	}
}

// fillAgainKilled does what ApplyDiff does, up to its last step.
func fillAgainKilled(t *testing.T, d *Driver, id string, data []byte) {
	t.Helper()
	_, unlock := d.layers.lock(id)
	defer unlock()
	l, err := openLayer(d.home, id)
	must(t, err)
	defer l.close()
	_, err = d.beginApply(l, &layerState{}, false)
	must(t, err)
	_, err = archive.Unpack(t.Context(), d.home+"/"+id+"/diff", bytes.NewReader(data), archive.UnpackOptions{})
	must(t, err)
	s, err := d.openStaging()
	must(t, err)
	defer s.close()
	link, err := l.link()
	must(t, err)
	b, err := d.join(s)
	must(t, err)
	must(t, l.noteApplied(b, applyPrefix+link))
	d.leave(b, syncWhole, time.Hour)
}

// TestRepairTurnsBack: the link of a whole layer that leads nowhere, of which no record tells, is mended by Repair.
func TestRepairTurnsBack(t *testing.T) {
	d := newTestDriver(t, t.TempDir()+"/home", quietOptions(DurabilityOff))
	apply(t, d, "low", "", makeTar(t, file("a", "1")))
	must(t, d.CreateReadWrite("box", "low", nil))
	link, err := os.ReadFile(d.home + "/low/link")
	must(t, err)
	must(t, errors.Join(os.Remove(d.home+"/l/"+string(link)), os.Symlink(incompleteTarget("low"), d.home+"/l/"+string(link))))
	if problems, err := d.Check(); err != nil || len(problems) == 0 {
		t.Errorf("Check: %v %v", problems, err)
	}
	done, err := d.Repair(RepairOpts{})
	if err != nil || len(done) != 1 {
		t.Errorf("Repair: %v %v", done, err)
	}
	wantNoProblem(t, d)
	getPut(t, d, "box", 1)
}

// TestStagingFile: a file or a link that a crash has left in staging is deleted where there are quotas, too.
func TestStagingFile(t *testing.T) {
	d := newTestDriver(t, t.TempDir()+"/home", Options{})
	d.quota = &quota.Control{} // any: it opens the path as a directory first
	defer func() { d.quota = nil }()
	must(t, os.WriteFile(d.home+"/staging/trash-X", nil, 0o600))
	must(t, os.Symlink("../a/diff", d.home+"/staging/trash-Y"))
	d.trash.add(d, "trash-X", "trash-Y")
	d.trash.wait()
	for _, name := range []string{"trash-X", "trash-Y"} {
		if _, err := os.Lstat(d.home + "/staging/" + name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// giveProject gives a tree a project of its own, as limits do. xfs has projects without quotas too.
func giveProject(t *testing.T, root string, id uint32) {
	t.Helper()
	const fsGetXattr, fsSetXattr, inherit = 0x801c581f, 0x401c5820, 0x200 // FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, FS_XFLAG_PROJINHERIT
	must(t, filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		var x struct {
			xflags, extsize, nextents, projid, cowextsize uint32
			pad                                           [8]byte
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsGetXattr, uintptr(unsafe.Pointer(&x))); errno != 0 {
			return errno
		}
		x.projid = id
		if e.IsDir() {
			x.xflags |= inherit
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsSetXattr, uintptr(unsafe.Pointer(&x))); errno != 0 {
			return errno
		}
		return nil
	}))
}

// TestProjectPowerCut: after a power cut New writes the files of a layer with a project of its own again.
func TestProjectPowerCut(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	home := overlaytest.MountFS(t, overlaytest.FS{Name: "xfs"})
	d, err := New(home, quietOptions(DurabilityBackground))
	must(t, err)
	must(t, errors.Join(d.Create("base", "", nil), d.Sync(), d.CreateReadWrite("box", "base", nil)))
	listed, err := os.Readlink(home + "/box/listed")
	must(t, errors.Join(err, os.Remove(home+"/box/listed"))) // a symlink cannot be opened to be given a project
	giveProject(t, home+"/box", 7)
	must(t, os.Symlink(listed, home+"/box/listed"))
	failUnsynced(t, d)
	must(t, errors.Join(os.Truncate(home+"/box/link", 0), os.Truncate(home+"/box/lower", 0)))
	_ = d.Cleanup() // nothing more can be synced
	d, err = New(home, quietOptions(DurabilityBackground))
	must(t, err)
	getPut(t, d, "box", 1)
	must(t, d.Cleanup())
}

// TestFilledAgainSealed: a layer that is filled again after an apply that failed need not be sought in all chains to be removed.
func TestFilledAgainSealed(t *testing.T) {
	d := newTestDriver(t, t.TempDir()+"/home", quietOptions(DurabilityOff))
	must(t, d.Create("base", "", nil))
	data := makeTar(t, file("a", "1"))
	_, err := d.ApplyDiff("base", "", bytes.NewReader(data[:600]))
	wantErr(t, err, archive.ErrFormat)
	before, err := os.Readlink(d.home + "/base/listed")
	must(t, err)
	_, err = d.ApplyDiff("base", "", bytes.NewReader(data))
	must(t, err)
	l, err := openLayer(d.home, "base")
	must(t, err)
	defer l.close()
	if sealed, err := d.listsAll(l, -1); err != nil || !sealed {
		t.Errorf("sealed: %v %v", sealed, err)
	}
	if after, err := os.Readlink(d.home + "/base/listed"); err != nil || after == before {
		t.Errorf("%s, before %s: %v", after, before, err)
	}
}
