package split

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// layer makes a tar and the directory that it would unpack to.
func layer(t *testing.T) (tarball []byte, dir string) {
	dir = t.TempDir()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range []struct{ name, body string }{{"a", "first"}, {"d/b", ""}, {"d/c", "third"}} {
		must(t, w.WriteHeader(&tar.Header{Name: "./" + f.name, Mode: 0o600, Size: int64(len(f.body)), Format: tar.FormatGNU}))
		_, err := io.WriteString(w, f.body)
		must(t, err)
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, f.name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, f.name), []byte(f.body), 0o600))
	}
	must(t, w.Close())
	b.Write(make([]byte, 5000)) // odd padding, which Pack would never make
	return b.Bytes(), dir
}

func record(t *testing.T, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.split.gz")
	r := Record(bytes.NewReader(b), path)
	got, err := io.ReadAll(r)
	must(t, err)
	if !bytes.Equal(got, b) {
		t.Error("the tar is not passed through")
	}
	must(t, r.Keep())
	must(t, r.Close())
	entries, err := os.ReadDir(filepath.Dir(path))
	must(t, err)
	if len(entries) > 1 {
		t.Errorf("left: %v", entries)
	}
	return path
}

func replayAll(path, dir string) ([]byte, error) {
	r, err := Replay(path, dir)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	return b, errors.Join(err, r.Close())
}

func TestSameBytes(t *testing.T) {
	b, dir := layer(t)
	got, err := replayAll(record(t, b), dir)
	must(t, err)
	if !bytes.Equal(got, b) {
		t.Error("another tar")
	}
}

func TestChangedFiles(t *testing.T) {
	b, dir := layer(t)
	path := record(t, b)
	file := filepath.Join(dir, "a")
	for name, spoil := range map[string]func() error{
		"content": func() error { return os.WriteFile(file, []byte("other"), 0o600) },
		"gone":    func() error { return nil },
		"escape":  func() error { return os.Symlink("/etc/hostname", file) },
		"fifo":    func() error { return unix.Mkfifo(file, 0o600) },
	} {
		must(t, os.RemoveAll(file))
		must(t, spoil())
		if _, err := replayAll(path, dir); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// A tar that tar-split cannot read is passed on, and has no split.
func TestUnparsable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.split.gz")
	junk := bytes.Repeat([]byte("no tar "), 1<<16)
	r := Record(bytes.NewReader(junk), path)
	got, err := io.ReadAll(r)
	must(t, err)
	if !bytes.Equal(got, junk) {
		t.Error("not passed through")
	}
	must(t, r.Keep())
	must(t, r.Close())
	if _, err := Replay(path, t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// A recording that is given up leaves nothing.
func TestGivenUp(t *testing.T) {
	b, _ := layer(t)
	dir := t.TempDir()
	r := Record(bytes.NewReader(b), filepath.Join(dir, "x"))
	_, err := io.CopyN(io.Discard, r, 700)
	must(t, err)
	if err := r.Keep(); err == nil {
		t.Error("half a split is kept")
	}
	must(t, r.Close())
	entries, err := os.ReadDir(dir)
	must(t, err)
	if len(entries) > 0 {
		t.Errorf("left: %v", entries)
	}
}
