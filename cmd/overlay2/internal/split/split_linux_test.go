package split

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
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

func record(t *testing.T, b []byte, dir string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.split.gz")
	r := Record(bytes.NewReader(b), path)
	got, err := io.ReadAll(r)
	must(t, err)
	if !bytes.Equal(got, b) {
		t.Error("the tar is not passed through")
	}
	must(t, r.Keep(dir))
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
	got, err := replayAll(record(t, b, dir), dir)
	must(t, err)
	if !bytes.Equal(got, b) {
		t.Error("another tar")
	}
}

func TestChangedFiles(t *testing.T) {
	b, dir := layer(t)
	path := record(t, b, dir)
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
	must(t, r.Keep(t.TempDir()))
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
	if err := r.Keep(dir); err == nil {
		t.Error("half a split is kept")
	}
	must(t, r.Close())
	entries, err := os.ReadDir(dir)
	must(t, err)
	if len(entries) > 0 {
		t.Errorf("left: %v", entries)
	}
}

// A tar that the layer's files cannot make again has no split; so where there is one, and it fails, the layer is damaged.
func TestNotToBeMadeAgain(t *testing.T) {
	for name, entries := range map[string][]tar.Header{
		"twice":               {{Name: "a", Size: 5}, {Name: "a", Size: 5}},
		"twice, once from /":  {{Name: "a", Size: 5}, {Name: "/a", Size: 5}},
		"deleted again":       {{Name: "b", Size: 5}, {Name: ".wh.b"}},
		"another's content":   {{Name: "a", Size: 7}},
		"no file":             {{Name: "d", Size: 5}},
		"a file of the union": {{Name: ".wh..wh.plnk/1.2", Size: 5}, {Name: "a", Size: 5}},
	} {
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, "a"), []byte("12345"), 0o600))
		must(t, os.Mkdir(filepath.Join(dir, "d"), 0o700))
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range entries {
			h.Typeflag, h.Mode = tar.TypeReg, 0o600
			must(t, w.WriteHeader(&h))
			_, err := w.Write([]byte("1234567")[:h.Size])
			must(t, err)
		}
		must(t, w.Close())
		if _, err := os.Stat(record(t, b.Bytes(), dir)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: there is a split (%v)", name, err)
		}
	}
	// Sparse: tar-split sees the file with its holes, which the tar has not.
	overlaytest.Require(t, "cmd:tar")
	dir := t.TempDir()
	file := filepath.Join(dir, "a")
	must(t, os.WriteFile(file, []byte("12345"), 0o600))
	must(t, os.Truncate(file, 1<<20))
	for _, format := range []string{"gnu", "posix"} {
		b, err := exec.Command("tar", "-C", dir, "--format", format, "-cSf", "-", "a").Output()
		must(t, err)
		path := record(t, b, dir)
		if got, err := replayAll(path, dir); !errors.Is(err, os.ErrNotExist) && !bytes.Equal(got, b) {
			t.Errorf("%s: there is a split of another tar (%v)", format, err)
		}
	}
}

// A split that could not be written is an error, no tar without a split.
func TestSplitNoSpace(t *testing.T) {
	overlaytest.Require(t, "root")
	dir := t.TempDir()
	must(t, unix.Mount("overlay2-test", dir, "tmpfs", 0, "size=16k"))
	defer func() { must(t, unix.Unmount(dir, 0)) }()
	tarball := make([]byte, 1<<20)
	_, err := rand.Read(tarball)
	must(t, err)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, w.Close())
	b.Write(tarball) // padding, all of which is in the split
	r := Record(&b, filepath.Join(dir, "x"))
	_, err = io.Copy(io.Discard, r)
	must(t, err)
	if err := r.Keep(dir); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v, want ENOSPC", err)
	}
	must(t, r.Close())
}
