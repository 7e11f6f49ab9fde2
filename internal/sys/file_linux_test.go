package sys

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMakeEmptyAt: the file has its mode and time whatever the umask, and one that is there stays, which is exactly EEXIST.
func TestMakeEmptyAt(t *testing.T) {
	dir := t.TempDir()
	fd, err := OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = Close(fd) }()
	mtime := unix.Timespec{Sec: 1e9, Nsec: 5000}
	ino, err := MakeEmptyAt(fd, "new", 0o640, mtime)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := Fstatat(fd, "new", &st); err != nil {
		t.Fatal(err)
	}
	if st.Mtim != mtime || st.Mode != unix.S_IFREG|0o640 || st.Size != 0 || st.Nlink != 1 || st.Ino != ino {
		t.Errorf("made %+v, said inode %d", st, ino)
	}
	if err := os.WriteFile(filepath.Join(dir, "old"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if ino, err := MakeEmptyAt(fd, "old", 0o640, mtime); ino != 0 || err != unix.EEXIST {
		t.Errorf("made inode %d in the place of another: %v", ino, err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "old")); string(data) != "old" || err != nil {
		t.Errorf("it was %q, %v", data, err)
	}
}
