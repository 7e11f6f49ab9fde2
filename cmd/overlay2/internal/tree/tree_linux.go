// Package tree compares two directory trees as a user of the files sees them. It shares
// no code with the library, so that it can bear witness.
package tree

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Tree is what a directory holds, by path relative to it. The root is ".".
type Tree map[string]Entry

// Entry is one file: its properties by name, as text.
type Entry map[string]string

// Totals counts what a tree holds.
type Totals struct {
	Files, Dirs, Links, Others int
	Bytes                      int64
}

// Read reads the tree below root: type, mode, owner, mtime in nanoseconds, xattrs, device
// numbers, symlink targets, the SHA-256 of contents, and which names are hard links of
// one file. The root's own mtime is left out: mounting and looking change it.
func Read(ctx context.Context, root string) (Tree, Totals, error) {
	t, totals := Tree{}, Totals{}
	groups := map[[2]uint64][]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: path, Err: err}
		}
		e, err := read(path, &st, &totals)
		if err != nil {
			return err
		}
		if name == "." {
			delete(e, "mtime")
		}
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			key := [2]uint64{uint64(st.Dev), st.Ino}
			groups[key] = append(groups[key], name)
		}
		t[name] = e
		return nil
	})
	for _, names := range groups {
		if len(names) > 1 {
			for _, n := range names {
				t[n]["hard links"] = strings.Join(names, ", ")
			}
		}
	}
	return t, totals, err
}

func read(path string, st *unix.Stat_t, totals *Totals) (Entry, error) {
	e := Entry{
		"mode":  fmt.Sprintf("%#o", st.Mode&0o7777),
		"owner": fmt.Sprintf("%d:%d", st.Uid, st.Gid),
		"mtime": fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e["type"] = "directory"
		totals.Dirs++
	case unix.S_IFREG:
		e["type"] = "file"
		e["size"] = fmt.Sprint(st.Size)
		sum, err := content(path)
		if err != nil {
			return nil, err
		}
		e["content"] = sum
		totals.Files++
		totals.Bytes += st.Size
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return nil, err
		}
		e["type"], e["target"] = "symlink", target
		totals.Links++
	default:
		e["type"] = map[uint32]string{unix.S_IFCHR: "character device", unix.S_IFBLK: "block device", unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket"}[st.Mode&unix.S_IFMT]
		if st.Mode&unix.S_IFMT == unix.S_IFCHR || st.Mode&unix.S_IFMT == unix.S_IFBLK {
			e["device"] = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		totals.Others++
	}
	return e, xattrs(path, e)
}

func content(path string) (_ string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), err
}

// xattrs adds the extended attributes, a symlink's own too.
func xattrs(path string, e Entry) error {
	buf := make([]byte, 1<<16) // the kernel's limit of a list and of a value
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "listxattr", Path: path, Err: err}
	}
	for _, name := range strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 }) {
		n, err := unix.Lgetxattr(path, name, buf)
		if err != nil {
			return &fs.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		e["xattr "+name] = hex.EncodeToString(buf[:n])
	}
	return nil
}

// Diff lists how b differs from a, sorted by path.
func Diff(a, b Tree) []string {
	names := map[string]bool{}
	for n := range a {
		names[n] = true
	}
	for n := range b {
		names[n] = true
	}
	var out []string
	for _, n := range slices.Sorted(maps.Keys(names)) {
		x, y := a[n], b[n]
		switch {
		case x == nil:
			out = append(out, fmt.Sprintf("%q: only in the second", n))
		case y == nil:
			out = append(out, fmt.Sprintf("%q: only in the first", n))
		default:
			out = append(out, x.diff(n, y)...)
		}
	}
	return out
}

func (e Entry) diff(name string, o Entry) []string {
	keys := map[string]bool{}
	for k := range e {
		keys[k] = true
	}
	for k := range o {
		keys[k] = true
	}
	var out []string
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		if e[k] != o[k] {
			out = append(out, fmt.Sprintf("%q: %s %q, %q", name, k, e[k], o[k]))
		}
	}
	return out
}
