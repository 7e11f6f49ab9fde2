package overlay2

import (
	"os"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// TestUsageDeep: directories nested deeper than there are descriptors are counted, as a container can make them.
func TestUsageDeep(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	const depth = 3000
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.CreateReadWrite("box", "", nil))
	before, err := d.Usage("box")
	must(t, err)
	path, err := d.Get("box", "")
	must(t, err)
	fd, err := sys.OpenRoot(path)
	must(t, err)
	for range depth {
		must(t, sys.Mkdirat(fd, "d", 0o755))
		must(t, sys.WriteFileAt(fd, "f", []byte("x"), 0o644))
		below, err := sys.OpenDirat(fd, "d")
		must(t, err)
		must(t, sys.Close(fd))
		fd = below
	}
	must(t, sys.Close(fd))
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(len(openFDs(t)) + 100), Max: limit.Max}))
	after, err := d.Usage("box")
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
	must(t, err)
	if after.Inodes != before.Inodes+2*depth {
		t.Errorf("%d inodes, want %d", after.Inodes, before.Inodes+2*depth)
	}
	must(t, d.Put("box"))
	must(t, d.Remove("box"))
}

// TestUsageRemoved: a directory that is removed while it is walked, as the kernel does with work/work at each mount, is empty.
func TestUsageRemoved(t *testing.T) {
	overlaytest.Require(t, "linux")
	dir := t.TempDir() + "/dir"
	must(t, os.Mkdir(dir, 0o755))
	fd, err := sys.OpenRoot(dir)
	must(t, err)
	defer func() { must(t, sys.Close(fd)) }()
	must(t, os.Remove(dir))
	w := usageWalk{links: map[uint64]bool{}, frames: []usageFrame{{fd: -1, name: "dir"}}}
	must(t, w.list(&usageFrame{fd: fd}))
	if w.usage != (Usage{}) {
		t.Errorf("usage is %+v", w.usage)
	}
}
