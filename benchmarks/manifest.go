//go:build linux

package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// manifest describes a tree, a line an entry in order of names: what an unpacked layer
// must be alike in. The root's own metadata, which these tars don't hold, is left out.
func manifest(root string) ([]string, error) {
	var lines []string
	links := map[[2]uint64]string{}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		line, err := describe(path, path[len(root)+1:], links)
		lines = append(lines, line)
		return err
	})
	return lines, err
}

func describe(path, name string, links map[[2]uint64]string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", err
	}
	line := fmt.Sprintf("%q %o %d:%d %d.%09d", name, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		key := [2]uint64{uint64(st.Dev), st.Ino}
		if first, ok := links[key]; ok {
			return line + " = " + first, nil
		}
		links[key] = name
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		sum, err := fileSum(path)
		if err != nil {
			return "", err
		}
		line += fmt.Sprintf(" %d %s", st.Size, sum)
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return "", err
		}
		line += " -> " + target
	case unix.S_IFCHR, unix.S_IFBLK:
		line += fmt.Sprintf(" dev %d", st.Rdev)
	}
	attrs, err := xattrs(path)
	return line + attrs, err
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:12]), nil
}

// xattrs lists the names of xattrs but for those that are overlayfs's own, which a
// layer's own directory may have and its tar must not.
func xattrs(path string) (string, error) {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err == unix.ENOTSUP {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("listxattr %s: %w", path, err)
	}
	var names strings.Builder
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name != "" && name != "security.selinux" && !strings.HasPrefix(name, "trusted.overlay.") {
			names.WriteString(" " + name)
		}
	}
	return names.String(), nil
}

// differences says in a few words how two manifests differ, "" if they don't.
func differences(want, got []string) string {
	if len(want) != len(got) {
		return fmt.Sprintf("%d entries, not %d", len(got), len(want))
	}
	count, first := 0, ""
	for i := range want {
		if want[i] != got[i] {
			if count++; count == 1 {
				first = fmt.Sprintf("%s instead of %s", got[i], want[i])
			}
		}
	}
	if count == 0 {
		return ""
	}
	return fmt.Sprintf("%d entries differ, first: %s", count, first)
}

func sizeOf(path string) (size int64, id [2]uint64, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, id, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return st.Size, [2]uint64{uint64(st.Dev), st.Ino}, nil
}
