package snapshotter

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// idMap are the labels for a container whose ids begin at 100000.
func idMap() snapshots.Opt {
	return snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: "0:100000:1000",
		snapshots.LabelSnapshotGIDMapping: "0:200000:1000",
	})
}

// owners returns "name uid:gid" of a directory and what is in it.
func owners(t testing.TB, mounts []mount.Mount) string {
	t.Helper()
	var list []string
	write(t, mounts, func(dir string) {
		entries, err := os.ReadDir(dir)
		must(t, err)
		for _, name := range append([]string{"."}, fileNames(entries)...) {
			list = append(list, name+" "+owner(t, filepath.Join(dir, name)))
		}
	})
	return strings.Join(list, ", ")
}

func fileNames(entries []os.DirEntry) (names []string) {
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func owner(t testing.TB, path string) string {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

// TestIDMap: one copy of an image serves a container with an id map, through mounts that containerd makes.
func TestIDMap(t *testing.T) {
	ctx := context.Background()
	overlaytest.Require(t, "root", "idmap")
	s, err := New(t.TempDir(), Options{RemapIDs: true, Log: testLog(t)})
	must(t, err)
	defer func() {
		checkOrder(t, s)
		must(t, s.Close())
	}()
	commit(t, s, "base", "")
	commit(t, s, "top", "base")
	box, err := s.Prepare(ctx, "box", "top", idMap())
	must(t, err)
	if got := owners(t, box); got != ". 100000:200000, base 100000:200000, top 100000:200000" {
		t.Errorf("the container sees %s", got)
	}
	// What the container writes has the host's ids in the upper directory, so it is no layer of an image.
	write(t, box, func(dir string) {
		path := filepath.Join(dir, "made")
		must(t, os.WriteFile(path, nil, 0o644))
		must(t, os.Chown(path, 100007, 200007))
	})
	if err := s.Commit(ctx, "wrong", "box"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "uidmapping") {
		t.Errorf("commit: %v", err)
	}
	if got := owners(t, must1(s.View(ctx, "plain", "top"))); got != ". 0:0, base 0:0, top 0:0" {
		t.Errorf("without a map it shows %s", got)
	}
	for parent, want := range map[string]string{
		"base": ". 100000:200000, base 100000:200000",
		"top":  ". 100000:200000, base 100000:200000, top 100000:200000",
	} {
		if got := owners(t, must1(s.View(ctx, "view-"+parent, parent, idMap()))); got != want {
			t.Errorf("a view of %s shows %s", parent, got)
		}
	}
	// A base layer is mapped as a whole: on the disk are the ids of an image.
	mounts, err := s.Prepare(ctx, "scratch", "", idMap())
	must(t, err)
	write(t, mounts, func(dir string) {
		cmd := exec.Command("touch", "f") // by the container's root: the host's has no id there
		cmd.Dir = dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 100000, Gid: 200000}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got := owner(t, filepath.Join(dir, "f")); got != "100000:200000" {
			t.Errorf("the container sees its file belong to %s", got)
		}
	})
	if got := owner(t, filepath.Join(mounts[0].Source, "f")); got != "0:0" {
		t.Errorf("on the disk the file belongs to %s", got)
	}
	must(t, s.Commit(ctx, "scratch-committed", "scratch"))
}

func must1[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestIDMapByContainerd: without remap-ids containerd gives a chain whose owners it has changed itself, and the root of what is
// written belongs to the container's root.
func TestIDMapByContainerd(t *testing.T) {
	ctx := context.Background()
	s := openTest(t, t.TempDir(), Options{})
	commit(t, s, "base", "")
	for key, parent := range map[string]string{"box": "base", "scratch": ""} {
		mounts, err := s.Prepare(ctx, key, parent, idMap())
		must(t, err)
		if options := fmt.Sprint(mounts); strings.Contains(options, "uidmap") {
			t.Errorf("mounts %v", options)
		}
		write(t, mounts, func(dir string) {
			if got := owner(t, dir); got != "100000:200000" {
				t.Errorf("the root of %s belongs to %s", key, got)
			}
		})
	}
}
