package overlaytest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// buildTime is the modification time of everything that Build makes and no mtime= sets, in
// seconds: 2001-09-09. A fixed time makes two builds of one text equal.
const buildTime = 1000000000

// Build makes what text describes below root, which is made if it does not exist. One
// line is one entry; blank lines and lines that start with # are nothing:
//
//	dir  etc 0700 uid=1 gid=2 mtime=5.000000001 user.a="x"
//	file etc/passwd 0644 "root:x:0:0\n"     content: quoted as in Go
//	file "a b" size=10M data=5M:"x"         zeros, sparse, with a piece of data at an offset
//	symlink bin -> usr/bin
//	link etc/shadow -> etc/passwd           a hard link; what follows a link changes its file
//	char dev/null 0666 1:3
//	block dev/sda 1:3
//	fifo run/pipe
//	whiteout etc/motd                       a character device 0:0
//	opaque var/cache                        a directory with trusted.overlay.opaque="y"
//
// Words with blanks, quotes or odd bytes are quoted as in Go. Anything with a dot
// in its name before the = is an extended attribute. Missing parents are made; modes are 0755 for
// directories, 0644 for others unless given; owners 0:0; times are 2001-09-09, also that of
// directories, after all is made. The entry "." is the root. A directory that exists
// keeps what the line does not give, except its time.
func Build(t testing.TB, root, text string) {
	t.Helper()
	b := &builder{root: root, times: make(map[string]unix.Timespec)}
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	b.touch(".", unix.Timespec{Sec: buildTime})
	for line := range strings.Lines(text) {
		if err := b.line(strings.TrimSpace(line)); err != nil {
			t.Fatalf("build %q: %v", strings.TrimSpace(line), err)
		}
	}
	if err := b.setTimes(); err != nil {
		t.Fatal(err)
	}
}

// builder remembers the times to be set when all is made, as making an entry changes
// the time of its directory.
type builder struct {
	root  string
	order []string
	times map[string]unix.Timespec
}

// entry is one line of the text.
type entry struct {
	kind, name string
	mode       uint32
	hasMode    bool
	uid, gid   int
	hasOwner   bool
	mtime      unix.Timespec
	size       int64
	target     string
	dev        uint64
	pieces     []piece
	xattrs     [][2]string
}

// piece is data at an offset.
type piece struct {
	offset int64
	data   string
}

func (b *builder) touch(name string, at unix.Timespec) {
	if _, ok := b.times[name]; !ok {
		b.order = append(b.order, name)
	}
	b.times[name] = at
}

func (b *builder) setTimes() error {
	for _, name := range b.order {
		ts := b.times[name]
		path := filepath.Join(b.root, name)
		err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil {
			return fmt.Errorf("build: set the time of %s: %w", path, err)
		}
	}
	return nil
}

func (b *builder) line(line string) error {
	words, err := splitWords(line)
	if err != nil || len(words) == 0 || strings.HasPrefix(line, "#") {
		return err
	}
	e, err := parseEntry(words)
	if err != nil {
		return err
	}
	if err := b.parents(filepath.Dir(e.name)); err != nil {
		return err
	}
	path := filepath.Join(b.root, e.name)
	if err := e.create(b.root, path); err != nil {
		return err
	}
	b.touch(e.name, e.mtime)
	return e.attributes(path)
}

// parents makes the directories on the way to an entry.
func (b *builder) parents(dir string) error {
	if dir == "." {
		return nil
	}
	if err := b.parents(filepath.Dir(dir)); err != nil {
		return err
	}
	err := os.Mkdir(filepath.Join(b.root, dir), 0o755)
	if errors.Is(err, os.ErrExist) {
		if _, ok := b.times[dir]; !ok {
			b.touch(dir, unix.Timespec{Sec: buildTime})
		}
		return nil
	}
	if err == nil {
		b.touch(dir, unix.Timespec{Sec: buildTime})
	}
	return err
}

// create makes the bare entry.
func (e *entry) create(root, path string) error {
	switch e.kind {
	case "dir", "opaque":
		err := os.Mkdir(path, 0o755)
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		if !e.hasMode {
			e.mode, e.hasMode = 0o755, true
		}
		return err
	case "file":
		return e.createFile(path)
	case "symlink":
		return os.Symlink(e.target, path)
	case "link":
		return os.Link(filepath.Join(root, e.target), path)
	case "char", "whiteout":
		return unix.Mknod(path, unix.S_IFCHR|0o600, int(e.dev))
	case "block":
		return unix.Mknod(path, unix.S_IFBLK|0o600, int(e.dev))
	case "fifo":
		return unix.Mkfifo(path, 0o600)
	}
	return fmt.Errorf("unknown kind %q", e.kind)
}

func (e *entry) createFile(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	end := e.size
	for _, p := range e.pieces {
		end = max(end, p.offset+int64(len(p.data)))
		if _, err := f.WriteAt([]byte(p.data), p.offset); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(f.Truncate(end), f.Close())
}

// attributes sets owner, xattrs and mode in the order that keeps setuid and capabilities.
func (e *entry) attributes(path string) error {
	if e.hasOwner {
		if err := os.Lchown(path, e.uid, e.gid); err != nil {
			return err
		}
	}
	for _, x := range e.xattrs {
		if err := unix.Lsetxattr(path, x[0], []byte(x[1]), 0); err != nil {
			return fmt.Errorf("set %s: %w", x[0], err)
		}
	}
	if e.hasMode && e.kind != "symlink" {
		return unix.Chmod(path, e.mode)
	}
	return nil
}

func parseEntry(words []string) (*entry, error) {
	if len(words) < 2 {
		return nil, errors.New("want a kind and a name")
	}
	e := &entry{kind: words[0], name: filepath.Clean(words[1]), mtime: unix.Timespec{Sec: buildTime}}
	if filepath.IsAbs(e.name) || e.name == ".." || strings.HasPrefix(e.name, "../") {
		return nil, errors.New("the name leaves the root")
	}
	switch e.kind {
	case "opaque":
		e.xattrs = append(e.xattrs, [2]string{"trusted.overlay.opaque", "y"})
	case "file", "char", "block", "fifo":
		e.mode, e.hasMode = 0o644, true
	case "whiteout":
		e.mode, e.hasMode = 0, true
	}
	for i := 2; i < len(words); i++ {
		if words[i] == "->" && i+1 < len(words) {
			i++
			e.target = words[i]
			continue
		}
		if err := e.word(words[i]); err != nil {
			return nil, fmt.Errorf("%s: %w", words[i], err)
		}
	}
	return e, nil
}

// word takes one word after the name. Quotes still stand around what was quoted.
func (e *entry) word(w string) (err error) {
	if strings.HasPrefix(w, "\x00") {
		e.pieces = append(e.pieces, piece{data: w[1:]})
		return nil
	}
	key, value, ok := strings.Cut(w, "=")
	if !ok {
		if major, minor, ok := strings.Cut(w, ":"); ok {
			return e.device(major, minor)
		}
		mode, err := strconv.ParseUint(w, 8, 12)
		e.mode, e.hasMode = uint32(mode), true
		return err
	}
	switch key {
	case "uid":
		e.uid, err = strconv.Atoi(value)
		e.hasOwner = true
	case "gid":
		e.gid, err = strconv.Atoi(value)
		e.hasOwner = true
	case "mtime":
		e.mtime, err = parseTime(value)
	case "size":
		e.size, err = parseSize(value)
	case "data":
		offset, data, _ := strings.Cut(value, ":")
		var at int64
		at, err = parseSize(offset)
		e.pieces = append(e.pieces, piece{offset: at, data: data})
	default:
		if !strings.Contains(key, ".") {
			return errors.New("unknown word")
		}
		e.xattrs = append(e.xattrs, [2]string{key, value})
	}
	return err
}

func (e *entry) device(major, minor string) error {
	ma, err := strconv.ParseUint(major, 10, 32)
	if err != nil {
		return err
	}
	mi, err := strconv.ParseUint(minor, 10, 32)
	e.dev = unix.Mkdev(uint32(ma), uint32(mi))
	return err
}

// splitWords splits a line at blanks; a quoted string is part of a word wherever it
// begins. A word that is nothing but quoted, from the third on, is marked by a NUL: it is content.
func splitWords(line string) ([]string, error) {
	var words []string
	for line = strings.TrimLeft(line, " \t"); line != ""; line = strings.TrimLeft(line, " \t") {
		var b strings.Builder
		whole := line[0] == '"'
		for line != "" && line[0] != ' ' && line[0] != '\t' {
			if line[0] != '"' {
				b.WriteByte(line[0])
				line = line[1:]
				continue
			}
			quoted, err := strconv.QuotedPrefix(line)
			if err != nil {
				return nil, err
			}
			s, err := strconv.Unquote(quoted)
			if err != nil {
				return nil, err
			}
			b.WriteString(s)
			line = line[len(quoted):]
		}
		word := b.String()
		if whole && len(words) >= 2 && words[len(words)-1] != "->" {
			word = "\x00" + word
		}
		words = append(words, word)
	}
	return words, nil
}

// parseTime reads seconds with up to nine decimals, which count upwards also before 1970.
func parseTime(s string) (unix.Timespec, error) {
	sec, frac, _ := strings.Cut(s, ".")
	n, err := strconv.ParseInt(sec, 10, 64)
	if err != nil || len(frac) > 9 {
		return unix.Timespec{}, fmt.Errorf("bad time: %w", errors.Join(err, strconv.ErrSyntax))
	}
	ns, err := strconv.ParseUint(frac+strings.Repeat("0", 9-len(frac)), 10, 32)
	return unix.NsecToTimespec(n*1e9 + int64(ns)), err
}

// parseSize reads a number of bytes with K, M, G or T.
func parseSize(s string) (int64, error) {
	shift := 0
	if i := strings.IndexAny(s, "KMGT"); i >= 0 && i == len(s)-1 {
		shift = 10 * (1 + strings.IndexByte("KMGT", s[i]))
		s = s[:i]
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n << shift, err
}
