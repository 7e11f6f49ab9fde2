package overlaytest

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Extract unpacks a tar, gzipped if its name ends in .gz, into dir, with all that it
// says of each entry. It trusts the file, which is one of this repository's testdata or
// one that the test made: it is no judge of tars, only a second way to read a good one. Marks of
// deletion mean nothing to it, and xattrs of overlayfs are set as they are.
func Extract(t testing.TB, file, dir string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var r io.Reader = f
	if strings.HasSuffix(file, ".gz") {
		if r, err = gzip.NewReader(f); err != nil {
			t.Fatal(err)
		}
	}
	ExtractFrom(t, r, dir)
}

// ExtractFrom is Extract of a tar stream.
func ExtractFrom(t testing.TB, r io.Reader, dir string) {
	t.Helper()
	tr := tar.NewReader(r)
	var dirs []*tar.Header
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err == nil {
			err = extractEntry(tr, h, dir)
		}
		if err != nil {
			t.Fatalf("extract: %v", err)
		}
		if h.Typeflag == tar.TypeDir {
			dirs = append(dirs, h)
		}
	}
	// What was made in a directory has changed its time.
	for _, h := range dirs {
		if err := extractTime(h, filepath.Join(dir, h.Name)); err != nil {
			t.Fatalf("extract: %v", err)
		}
	}
}

func extractEntry(r io.Reader, h *tar.Header, dir string) error {
	path := filepath.Join(dir, h.Name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	mode, dev := uint32(h.Mode)&0o7777, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))
	var err error
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		err = extractFile(r, path)
	case tar.TypeDir:
		if err = os.Mkdir(path, 0o700); errors.Is(err, os.ErrExist) {
			err = nil
		}
	case tar.TypeSymlink:
		err = os.Symlink(h.Linkname, path)
	case tar.TypeLink:
		return os.Link(filepath.Join(dir, h.Linkname), path)
	case tar.TypeChar:
		err = unix.Mknod(path, unix.S_IFCHR|0o600, dev)
	case tar.TypeBlock:
		err = unix.Mknod(path, unix.S_IFBLK|0o600, dev)
	case tar.TypeFifo:
		err = unix.Mkfifo(path, 0o600)
	default:
		err = fmt.Errorf("%s: unknown type %q", h.Name, h.Typeflag)
	}
	if err != nil {
		return err
	}
	if err := os.Lchown(path, h.Uid, h.Gid); err != nil {
		return err
	}
	for key, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		if !ok {
			continue
		}
		if err := unix.Lsetxattr(path, name, []byte(value), 0); err != nil {
			return fmt.Errorf("set %s of %s: %w", name, h.Name, err)
		}
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := unix.Chmod(path, mode); err != nil {
			return err
		}
	}
	return extractTime(h, path)
}

func extractFile(r io.Reader, path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

func extractTime(h *tar.Header, path string) error {
	ts := unix.NsecToTimespec(h.ModTime.UnixNano())
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}
