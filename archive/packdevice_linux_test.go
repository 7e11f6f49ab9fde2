package archive

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// nodeTexts are devices that no driver has: to open one is ENXIO, but only by asking for the driver.
var nodeTexts = []string{"char z 4000:2", "block z 4000:2"}

// A file that becomes a device after its directory was listed is never opened: its driver, on the host, would run.
func TestPackFileBecomesDevice(t *testing.T) {
	overlaytest.Require(t, "root", "proc", "tmpfs", "mknod")
	overlaytest.NoLeaks(t)
	// Beside a mount beneath it a merged tree is read in another way.
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	for i, text := range append(nodeTexts, nodeTexts...) {
		if i == len(nodeTexts) {
			must(t, os.Mkdir(filepath.Join(base, "m"), 0o755))
			must(t, unix.Mount(t.TempDir(), filepath.Join(base, "m"), "", unix.MS_BIND, ""))
			t.Cleanup(func() { must(t, unix.Unmount(filepath.Join(base, "m"), unix.MNT_DETACH)) })
		}
		for _, f := range []Format{OverlayTrusted, OverlayUser, Merged} {
			dir := filepath.Join(base, fmt.Sprint(i, f))
			overlaytest.Build(t, dir, "file a size=1M\nfile z \"x\"")
			r := begun(t, dir, 64<<10, PackOptions{Format: f, NoSparse: true})
			must(t, os.Remove(filepath.Join(dir, "z")))
			overlaytest.Build(t, dir, text)
			if err := rest(t, r); !errors.Is(err, ErrChanged) || errors.Is(err, unix.ENXIO) {
				t.Errorf("%v, %s: %v", f, text, err)
			}
		}
	}
}

// Nor is it where files are compared, or looked for in several layers.
func TestOpenNoDevice(t *testing.T) {
	overlaytest.Require(t, "root", "proc", "mknod")
	overlaytest.NoLeaks(t)
	for _, text := range nodeTexts {
		dir := t.TempDir()
		overlaytest.Build(t, dir, text)
		fd := mustOpen(t, dir)
		if _, err := openRegular(fd, sys.MakeName("z")); !errors.Is(err, ErrChanged) || errors.Is(err, unix.ENXIO) {
			t.Errorf("%s: %v", text, err)
		}
		must(t, sys.Close(fd))
	}
}

// What is mounted beneath the root is part of the tree, a directory as a file, and can be unmounted afterwards.
func TestPackMountsBelow(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	dir, other := filepath.Join(base, "d"), filepath.Join(base, "other")
	overlaytest.Build(t, dir, "dir . 0755\nfile m/hidden\nfile n \"hidden\"\nfile o")
	overlaytest.Build(t, other, "file f \"shown\"\nfile g/h \"too\"")
	for from, to := range map[string]string{other: "m", filepath.Join(other, "f"): "n"} {
		must(t, unix.Mount(from, filepath.Join(dir, to), "", unix.MS_BIND, ""))
		t.Cleanup(func() { must(t, unix.Unmount(filepath.Join(dir, to), unix.MNT_DETACH)) })
	}
	const want = "m/ 5 755 0:0\nm/f 0 644 0:0 \"shown\"\nm/g/ 5 755 0:0\nm/g/h 0 644 0:0 \"too\"\nn 0 644 0:0 \"shown\"\no 0 644 0:0\n"
	for _, f := range []Format{OverlayTrusted, OverlayUser, Merged} {
		if got := listed(t, packed(t, dir, PackOptions{Format: f})); got != want {
			t.Errorf("%v:\n%s", f, got)
		}
	}
}

// A tree so deep that the directories above are closed and found again by "..", below a mount.
func TestPackDeepBelowMount(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	dir, other := filepath.Join(base, "d"), filepath.Join(base, "other")
	overlaytest.Build(t, dir, "dir m\nfile z")
	must(t, os.Mkdir(other, 0o755))
	deep(t, other, 200)
	must(t, unix.Mount(other, filepath.Join(dir, "m"), "", unix.MS_BIND, ""))
	defer func() { must(t, unix.Unmount(filepath.Join(dir, "m"), unix.MNT_DETACH)) }()
	got := listed(t, packed(t, dir, PackOptions{}))
	if n := strings.Count(got, "/ddd/ "); n != 200 || !strings.HasSuffix(got, "z 0 644 0:0\n") {
		t.Errorf("%d directories:\n%s", n, got[len(got)-200:])
	}
}
