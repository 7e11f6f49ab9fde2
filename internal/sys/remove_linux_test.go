package sys

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func openTemp(t *testing.T) (string, int) {
	t.Helper()
	dir := t.TempDir()
	fd, err := OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Close(fd); err != nil {
			t.Error(err)
		}
	})
	return dir, fd
}

func TestRemoveAllAt(t *testing.T) {
	dir, fd := openTemp(t)
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "canary"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range 5000 { // more than one batch
		if err := os.MkdirAll(filepath.Join(dir, "tree", strconv.Itoa(i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"tree/1/link", "tree/link"} {
		if err := os.Symlink(outside, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := RemoveAllAt(fd, "tree"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "tree")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("tree is still there: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(outside, "canary")); err != nil {
		t.Errorf("a symlink was followed: %v", err)
	}
	if err := RemoveAllAt(fd, "tree"); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestRemoveAllAtDeep(t *testing.T) {
	_, fd := openTemp(t)
	const depth = 3000
	at := fd
	for i := range depth {
		if err := Mkdirat(at, "d", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := WriteFileAt(at, "f", []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		next, err := OpenDirat(at, "d")
		if i > 0 {
			if err := Close(at); err != nil {
				t.Fatal(err)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		at = next
	}
	if err := Close(at); err != nil {
		t.Fatal(err)
	}
	if err := RemoveAllAt(fd, "d"); err != nil {
		t.Fatal(err)
	}
	if err := IsDirat(fd, "d"); err != unix.ENOENT {
		t.Errorf("still there: %v", err)
	}
}

func TestOpenBeneath(t *testing.T) {
	dir, fd := openTemp(t)
	if err := os.MkdirAll(filepath.Join(dir, "a", "b"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a", filepath.Join(dir, "s")); err != nil {
		t.Fatal(err)
	}
	for name, open := range map[string]func(int, string) (int, error){"openat2": OpenBeneath, "openat": walkBeneath} {
		t.Run(name, func(t *testing.T) {
			got, err := open(fd, "a/b")
			if err != nil {
				t.Fatal(err)
			}
			if err := Close(got); err != nil {
				t.Error(err)
			}
			for _, bad := range []string{"s/b", "a/../..", "..", "a/c", strings.Repeat("x", 300)} {
				if got, err := open(fd, bad); err == nil {
					t.Errorf("%q opened", bad)
					_ = Close(got)
				}
			}
		})
	}
}

func TestReadFileAt(t *testing.T) {
	dir, fd := openTemp(t)
	if err := WriteFileAt(fd, "f", []byte("12345"), 0o604); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(dir, "f")); err != nil || st.Mode().Perm() != 0o604 {
		t.Errorf("mode %v %v", st.Mode(), err)
	}
	if got, err := ReadFileAt(fd, "f", 5); err != nil || string(got) != "12345" {
		t.Errorf("%q %v", got, err)
	}
	if got, err := ReadFileAt(fd, "f", 4); err == nil {
		t.Errorf("longer than the limit: %q", got)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "p"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadFileAt(fd, "p", 5); !errors.Is(err, ErrNotRegular) {
		t.Errorf("fifo: %v", err)
	}
	if err := os.Symlink("f", filepath.Join(dir, "s")); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadFileAt(fd, "s", 5); !errors.Is(err, unix.ELOOP) {
		t.Errorf("symlink: %v", err)
	}
}

func TestParseKernelVersion(t *testing.T) {
	for s, want := range map[string]KernelVersion{"6.1.0-37-amd64": {6, 1}, "4.0": {4, 0}, "6.18.44-fc": {6, 18}, "5.10-rc1": {5, 10}} {
		if got, err := ParseKernelVersion(s); err != nil || got != want {
			t.Errorf("%q: %v %v", s, got, err)
		}
	}
	for _, s := range []string{"", "x", "6"} {
		if got, err := ParseKernelVersion(s); err == nil {
			t.Errorf("%q: %v", s, got)
		}
	}
}
