package quota

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
)

// TestDeviceNodeAtOnce: drivers that open one home in the same moment, in one process or as
// process 1 of two containers, all find the node, also in place of one of another device.
func TestDeviceNodeAtOnce(t *testing.T) {
	overlaytest.Require(t, "root", "mknod")
	for _, old := range []struct {
		name string
		make func(path string) error
	}{
		{"none", func(string) error { return nil }},
		{"other device", func(path string) error { return unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(250, 250))) }},
		{"a file", func(path string) error { return os.WriteFile(path, nil, 0o600) }},
	} {
		t.Run(old.name, func(t *testing.T) {
			for range 50 {
				openAtOnce(t, old.make)
			}
		})
	}
}

func openAtOnce(t *testing.T, prepare func(path string) error) {
	t.Helper()
	home := t.TempDir()
	node := filepath.Join(home, deviceName)
	if err := prepare(node); err != nil {
		t.Fatal(err)
	}
	fd, err := openDir(home)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if err := makeDevice(fd, uint64(st.Dev)); err != nil {
				t.Error(err)
			}
			var got unix.Stat_t
			if err := sys.Fstatat(unix.AT_FDCWD, node, &got); err != nil {
				t.Error(err)
			} else if got.Mode&unix.S_IFMT != unix.S_IFBLK || got.Rdev != st.Dev {
				t.Errorf("mode %#o, device %#x, want %#x", got.Mode, got.Rdev, st.Dev)
			}
		})
	}
	all.Wait()
	if err := sys.Close(fd); err != nil {
		t.Fatal(err)
	}
	names, err := os.ReadDir(home)
	if err != nil || len(names) != 1 {
		t.Errorf("left behind: %v %v", names, err)
	}
}
