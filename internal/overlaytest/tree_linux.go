package overlaytest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TreeOption leaves something out of what Tree tells.
type TreeOption uint

const (
	// NoTimes leaves out all modification times.
	NoTimes TreeOption = 1 << iota
	// NoRootTime leaves out the modification time of the root.
	NoRootTime
	// NoDirTimes leaves out the modification times of directories.
	NoDirTimes
	// NoOverlayXattrs leaves out trusted.overlay.* and user.overlay.*.
	NoOverlayXattrs
	// NoXattrs leaves out all extended attributes.
	NoXattrs
	// NoOwners leaves out owners.
	NoOwners
	// NoHardlinks leaves out the numbers of groups of hard links.
	NoHardlinks
	// NoRoot leaves out the entry of the root.
	NoRoot
)

// walker makes the text of one tree.
type walker struct {
	t    testing.TB
	skip TreeOption
	rows []treeRow
}

// treeRow is one line; its inode tells hard links.
type treeRow struct {
	text string
	dev  uint64
	ino  uint64
	link bool
}

// Tree describes all that is below root, one line an entry, a directory before what it
// holds and that in the order of its bytes:
//
//	"etc/passwd" file 0644 0:0 size=12 mtime=1000000000.000000000 sha256=4ae7c3b6ac0beff6 user.a="x" link=1
//	"dev/null" char 0666 0:0 1:3 mtime=1000000000.000000000
//	"bin" symlink 0777 0:0 mtime=1000000000.000000000 -> "usr/bin"
//
// link numbers the groups of hard links in the order of their first names; files with
// the same number are one file. Only links within the tree count. Whiteouts (character
// devices 0:0) are never a group: the kernel shares one inode among them as it likes.
// security.selinux is left out. No symlink is followed, and a name may be of any length
// and depth, as the walk goes by handles.
func Tree(t testing.TB, root string, opts ...TreeOption) string {
	t.Helper()
	w := walker{t: t}
	for _, o := range opts {
		w.skip |= o
	}
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("tree of %s: %v", root, err)
	}
	dir := os.NewFile(uintptr(fd), root)
	defer dir.Close()
	if w.skip&NoRoot == 0 {
		w.entry(dir, ".", ".")
	}
	w.dir(dir, "")
	return w.text()
}

// text numbers the hard links and joins the lines.
func (w *walker) text() string {
	type inode struct{ dev, ino uint64 }
	count, number := make(map[inode]int), make(map[inode]int)
	for _, r := range w.rows {
		if r.link {
			count[inode{r.dev, r.ino}]++
		}
	}
	var b strings.Builder
	for _, r := range w.rows {
		b.WriteString(r.text)
		if key := (inode{r.dev, r.ino}); count[key] > 1 {
			if number[key] == 0 {
				number[key] = len(number) + 1
			}
			fmt.Fprintf(&b, " link=%d", number[key])
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// dir adds what the directory holds; path is its name with a slash, or empty.
func (w *walker) dir(dir *os.File, path string) {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		w.t.Fatalf("tree: read %q: %v", path, err)
	}
	slices.Sort(names)
	for _, name := range names {
		if !w.entry(dir, name, path+name) {
			continue
		}
		fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			w.t.Fatalf("tree: open %q: %v", path+name, err)
		}
		sub := os.NewFile(uintptr(fd), name)
		w.dir(sub, path+name+"/")
		sub.Close()
	}
}

// entry adds one line and reports whether it is of a directory.
func (w *walker) entry(dir *os.File, name, path string) bool {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		// A whiteout where overlayfs does not look for one shows as a name without a file.
		w.rows = append(w.rows, treeRow{text: fmt.Sprintf("%q unreadable: %v", path, err)})
		return false
	}
	kind := st.Mode & unix.S_IFMT
	var b strings.Builder
	fmt.Fprintf(&b, "%q %s %04o", path, kindName(kind), st.Mode&0o7777)
	if w.skip&NoOwners == 0 {
		fmt.Fprintf(&b, " %d:%d", st.Uid, st.Gid)
	}
	whiteout := false
	switch kind {
	case unix.S_IFCHR, unix.S_IFBLK:
		fmt.Fprintf(&b, " %d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)))
		whiteout = kind == unix.S_IFCHR && st.Rdev == 0
	case unix.S_IFREG:
		fmt.Fprintf(&b, " size=%d", st.Size)
	}
	isDir := kind == unix.S_IFDIR
	if w.skip&NoTimes == 0 && (!isDir || w.skip&NoDirTimes == 0) && (path != "." || w.skip&NoRootTime == 0) {
		fmt.Fprintf(&b, " mtime=%d.%09d", int64(st.Mtim.Sec), int64(st.Mtim.Nsec))
	}
	switch kind {
	case unix.S_IFREG:
		fmt.Fprintf(&b, " sha256=%s", w.sum(dir, name, path))
	case unix.S_IFLNK:
		fmt.Fprintf(&b, " -> %q", w.readlink(dir, name, path))
	}
	if w.skip&NoXattrs == 0 {
		w.xattrs(&b, fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name), path)
	}
	w.rows = append(w.rows, treeRow{
		text: b.String(), dev: uint64(st.Dev), ino: st.Ino,
		link: st.Nlink > 1 && !isDir && !whiteout && w.skip&NoHardlinks == 0,
	})
	return isDir
}

func kindName(kind uint32) string {
	switch kind {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "dir"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFCHR:
		return "char"
	case unix.S_IFBLK:
		return "block"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	}
	return strconv.Itoa(int(kind))
}

// sum returns the first 16 digits of the content's SHA-256: enough to tell two files apart.
func (w *walker) sum(dir *os.File, name, path string) string {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "unreadable: " + err.Error()
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "unreadable: " + err.Error()
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8])
}

func (w *walker) readlink(dir *os.File, name, path string) string {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil {
		w.t.Fatalf("tree: readlink %q: %v", path, err)
	}
	return string(buf[:n])
}

// xattrs adds the attributes of the entry itself, sorted by name.
func (w *walker) xattrs(b *strings.Builder, at, path string) {
	names, err := listXattrs(at)
	if err != nil {
		w.t.Fatalf("tree: list xattrs of %q: %v", path, err)
	}
	for _, name := range names {
		overlay := strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.")
		if name == "security.selinux" || overlay && w.skip&NoOverlayXattrs != 0 {
			continue
		}
		value, err := getXattr(at, name)
		if err != nil {
			w.t.Fatalf("tree: read xattr %s of %q: %v", name, path, err)
		}
		fmt.Fprintf(b, " %s=%q", strings.Trim(strconv.Quote(name), `"`), value)
	}
}

// listXattrs returns the sorted names of the attributes of path itself; none where the
// filesystem has no attributes.
func listXattrs(path string) ([]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err == unix.ENOTSUP {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range bytes.SplitSeq(buf[:n], []byte{0}) {
		if len(name) > 0 {
			names = append(names, string(name))
		}
	}
	slices.Sort(names)
	return names, nil
}

func getXattr(path, name string) ([]byte, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(path, name, buf)
	if err != nil {
		return nil, err
	}
	return buf[:n], nil
}
