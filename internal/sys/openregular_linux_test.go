package sys

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// nodes makes one of each kind of file in a new directory. The devices have no driver: to open one
// is ENXIO, but only by asking for the driver.
func nodes(t *testing.T) (fd int) {
	t.Helper()
	overlaytest.Require(t, "root", "proc", "mknod")
	dir, fd := openTemp(t)
	path := func(name string) string { return filepath.Join(dir, name) }
	err := errors.Join(os.WriteFile(path("file"), []byte("content"), 0o644), os.Symlink("file", path("symlink")), os.Mkdir(path("dir"), 0o755),
		unix.Mkfifo(path("fifo"), 0o644), unix.Mknod(path("socket"), unix.S_IFSOCK|0o644, 0),
		unix.Mknod(path("char"), unix.S_IFCHR|0o644, int(unix.Mkdev(4000, 2))), unix.Mknod(path("block"), unix.S_IFBLK|0o644, int(unix.Mkdev(4000, 2))))
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestOpenRegular(t *testing.T) {
	fd := nodes(t)
	overlaytest.NoLeaks(t)
	for name, want := range map[string]error{
		"file": nil, "none": unix.ENOENT, "symlink": ErrNotRegular, "dir": ErrNotRegular, "fifo": ErrNotRegular, "socket": ErrNotRegular,
		"char": ErrNotRegular, "block": ErrNotRegular,
	} {
		f, err := OpenRegular(fd, MakeName(name))
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		if err != nil {
			continue
		}
		buf := make([]byte, 10)
		if n, err := Read(f, buf); err != nil || string(buf[:n]) != "content" {
			t.Errorf("read %q, %v", buf[:n], err)
		}
		if err := Close(f); err != nil {
			t.Error(err)
		}
	}
}

// Through CloneNoDevices no driver is asked, all else is there, and the directory itself stays as it is.
func TestCloneNoDevices(t *testing.T) {
	fd := nodes(t)
	overlaytest.NoLeaks(t)
	clone, err := CloneNoDevices(fd)
	if err != nil {
		overlaytest.Missing(t, "detached mounts", err)
	}
	for name, want := range map[string]error{
		"file": nil, "dir": nil, "none": unix.ENOENT, "symlink": unix.ELOOP, "char": unix.EACCES, "block": unix.EACCES,
	} {
		f, err := OpenUnsafe(clone, MakeName(name))
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		if err == nil {
			_ = Close(f)
		}
	}
	if _, err := OpenUnsafe(fd, MakeName("char")); err != unix.ENXIO {
		t.Errorf("the directory itself: %v", err)
	}
	var here, there Stat
	if err := errors.Join(StatFd(fd, &here), StatFd(clone, &there), Close(clone)); err != nil || here != there {
		t.Errorf("%+v, %+v, %v", here, there, err)
	}
}
