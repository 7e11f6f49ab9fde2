package overlaytest

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// RandomOption changes what Random does.
type RandomOption uint

const (
	// NoDevices leaves out character and block devices, which need root.
	NoDevices RandomOption = 1 << iota
	// NoRandomXattrs leaves out operations on extended attributes.
	NoRandomXattrs
	// NoRandomHardlinks leaves out hard links.
	NoRandomHardlinks
	// NoDirRename leaves out renaming directories.
	NoDirRename
	// NoRandomOwners leaves out changes of owners, which need root.
	NoRandomOwners
	// OddNames takes names with odd bytes for new entries, not only short plain ones.
	OddNames
)

// Op is one operation on a tree; Apply does it.
type Op struct {
	// Verb is what is done: create, write, append, truncate, chmod, chown, rename, unlink, removeall,
	// mkdir, symlink, link, mkfifo, mknod, setxattr, removexattr, utimes.
	Verb string
	// Path and To are relative to the root. To is the new name of rename and link (Path is
	// the existing one), and the target of symlink.
	Path, To string
	// Mode is a mode, or the owner of chown (uid<<16|gid).
	Mode uint32
	// N is an offset, size, device number or seed of the content.
	N int64
	// Name is that of an xattr.
	Name string
	// Data is content or the value of an xattr.
	Data []byte
	// Time is the modification time that what was touched gets, in nanoseconds.
	Time int64
}

// String tells the operation in a line, for the log of a failed test.
func (o Op) String() string {
	s := fmt.Sprintf("%s %q", o.Verb, o.Path)
	if o.To != "" {
		s += fmt.Sprintf(" %q", o.To)
	}
	return s + fmt.Sprintf(" mode=%#o n=%d %s len=%d", o.Mode, o.N, o.Name, len(o.Data))
}

// Random applies steps random operations to the tree at root and returns them, so that
// Apply can do the very same to another tree that was equal: a mounted overlay and a plain
// directory, say, must stay equal then in all that Tree tells. The operations follow
// from r and the tree at the start. Besides plain changes they replace files by directories
// and the reverse, and remove whole directories.
//
// Times are set explicitly, so trees can be compared with them. A directory whose rename
// is EXDEV, as overlayfs without redirect_dir says of one from a lower layer, is moved
// as mv does it. Files that have several links at the start are only ever removed:
// overlayfs breaks the link when it copies one of them up, a plain directory does not.
func Random(t testing.TB, r *rand.Rand, root string, steps int, opts ...RandomOption) []Op {
	t.Helper()
	m := newModel(t, r, root)
	for _, o := range opts {
		m.opts |= o
	}
	ops := make([]Op, 0, steps)
	for i := range steps {
		op := m.next()
		op.Time = buildTime*1e9 + int64(i+1)*1_000_000_007
		if err := apply(root, op); err != nil {
			t.Fatalf("operation %d, %s: %v", i, op, err)
		}
		ops = append(ops, op)
	}
	return ops
}

// Apply applies operations that Random returned.
func Apply(t testing.TB, root string, ops []Op) {
	t.Helper()
	for i, op := range ops {
		if err := apply(root, op); err != nil {
			t.Fatalf("operation %d, %s: %v", i, op, err)
		}
	}
}

// node is what the model knows of a file or directory.
type node struct {
	dir    bool
	file   bool
	frozen bool
	links  int
	xattrs map[string]bool
}

// model is the tree as Random knows it, from which it draws what is possible.
type model struct {
	r     *rand.Rand
	opts  RandomOption
	nodes map[string]*node
	paths []string // sorted keys of nodes, without the root
	names []string
}

func newModel(t testing.TB, r *rand.Rand, root string) *model {
	t.Helper()
	m := &model{r: r, nodes: map[string]*node{".": {dir: true, links: 1}}, names: Names(40)}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		dir := d.IsDir()
		m.add(rel, &node{dir: dir, file: d.Type().IsRegular(), frozen: !dir && st.Nlink > 1, links: 1})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *model) add(p string, n *node) {
	if i, ok := slices.BinarySearch(m.paths, p); !ok {
		m.paths = slices.Insert(m.paths, i, p)
	}
	m.nodes[p] = n
}

// remove takes p and all below it out.
func (m *model) remove(p string) {
	m.paths = slices.DeleteFunc(m.paths, func(q string) bool {
		if q != p && !strings.HasPrefix(q, p+"/") {
			return false
		}
		m.nodes[q].links--
		delete(m.nodes, q)
		return true
	})
}

// pick returns a random path of which ok says yes, "" if it finds none.
func (m *model) pick(ok func(p string, n *node) bool) string {
	for range 20 {
		if len(m.paths) == 0 {
			return ""
		}
		if p := m.paths[m.r.IntN(len(m.paths))]; ok(p, m.nodes[p]) {
			return p
		}
	}
	return ""
}

// fresh returns a path in some directory outside of avoid; it may exist if replace.
func (m *model) fresh(avoid string) string {
	for {
		dir := m.pick(func(p string, n *node) bool {
			return n.dir && p != avoid && !strings.HasPrefix(p, avoid+"/") && strings.Count(p, "/") < 6
		})
		if dir == "" || m.r.IntN(4) == 0 {
			dir = "."
		}
		name := string(rune('a'+m.r.IntN(26))) + fmt.Sprint(m.r.IntN(30))
		if m.opts&OddNames != 0 && m.r.IntN(3) == 0 {
			name = m.names[m.r.IntN(len(m.names))]
		}
		if p := path.Join(dir, name); m.nodes[p] == nil {
			return p
		}
	}
}

// verbs are drawn with their weights.
var verbs = []struct {
	verb   string
	weight int
	not    RandomOption
}{
	{"create", 20, 0}, {"write", 10, 0}, {"append", 5, 0}, {"truncate", 4, 0}, {"chmod", 6, 0}, {"chown", 5, NoRandomOwners},
	{"rename", 12, 0}, {"unlink", 8, 0}, {"removeall", 3, 0}, {"mkdir", 9, 0}, {"symlink", 4, 0}, {"link", 5, NoRandomHardlinks},
	{"mkfifo", 1, 0}, {"mknod", 2, NoDevices}, {"setxattr", 4, NoRandomXattrs}, {"removexattr", 2, NoRandomXattrs},
	{"utimes", 4, 0}, {"replace", 5, 0},
}

// next draws an operation that is possible and notes what it does to the model.
func (m *model) next() Op {
	total := 0
	for _, v := range verbs {
		total += v.weight
	}
	for {
		n := m.r.IntN(total)
		for _, v := range verbs {
			if n -= v.weight; n >= 0 {
				continue
			}
			if m.opts&v.not == 0 {
				if op, ok := m.draw(v.verb); ok {
					return op
				}
			}
			break
		}
	}
}

func (m *model) draw(verb string) (Op, bool) {
	switch verb {
	case "create", "mkdir", "symlink", "mkfifo", "mknod":
		return m.drawNew(verb, m.fresh("")), true
	case "replace":
		// A new entry of another kind under an old name: as an operation of its own it
		// removes what is there.
		p := m.pick(func(_ string, n *node) bool { return true })
		if p == "" {
			return Op{}, false
		}
		kind := "create"
		if !m.nodes[p].dir {
			kind = []string{"mkdir", "mkdir", "symlink"}[m.r.IntN(3)]
		}
		m.remove(p)
		return m.drawNew(kind, p), true
	case "rename", "link":
		return m.drawMove(verb)
	case "unlink", "removeall":
		p := m.pick(func(_ string, n *node) bool { return n.dir == (verb == "removeall") })
		if p == "" {
			return Op{}, false
		}
		m.remove(p)
		return Op{Verb: verb, Path: p}, true
	}
	return m.drawChange(verb)
}

// drawNew makes a new entry at p, in place of what is there.
func (m *model) drawNew(verb, p string) Op {
	op := Op{Verb: verb, Path: p, Mode: m.mode()}
	n := &node{dir: verb == "mkdir", file: verb == "create", links: 1}
	switch verb {
	case "create":
		op.Data = m.data()
		if m.r.IntN(8) == 0 {
			op.N = m.r.Int64N(1 << 20) // a hole before the data
		}
	case "symlink":
		op.To = []string{"/etc/passwd", "../x", "a", strings.Repeat("long/", 40)}[m.r.IntN(4)]
	case "mknod":
		op.Mode = []uint32{unix.S_IFCHR, unix.S_IFBLK}[m.r.IntN(2)] | op.Mode&0o777
		op.N = int64(unix.Mkdev(uint32(1+m.r.IntN(300)), uint32(m.r.IntN(70000))))
	case "mkdir":
		op.Mode |= 0o700
	}
	m.add(p, n)
	return op
}

// drawMove renames or links; the new name may replace a file.
func (m *model) drawMove(verb string) (Op, bool) {
	from := m.pick(func(p string, n *node) bool {
		return !n.frozen && (!n.dir || verb == "rename" && m.opts&NoDirRename == 0 && m.movable(p))
	})
	if from == "" {
		return Op{}, false
	}
	n := m.nodes[from]
	to := m.fresh(from)
	if verb == "rename" && !n.dir && m.r.IntN(3) == 0 {
		over := m.pick(func(p string, o *node) bool { return !o.dir && o != n })
		if over != "" {
			m.remove(over)
			to = over
		}
	}
	op := Op{Verb: verb, Path: from, To: to}
	if verb == "link" {
		n.links++
		m.add(to, n)
		return op, true
	}
	moved := map[string]*node{to: n}
	for _, p := range m.paths {
		if rest, ok := strings.CutPrefix(p, from+"/"); ok {
			moved[to+"/"+rest] = m.nodes[p]
		}
	}
	for _, sub := range moved {
		sub.links++ // remove takes it down again
	}
	m.remove(from)
	for p, sub := range moved {
		m.add(p, sub)
	}
	return op, true
}

// movable reports whether moving the directory by copying would keep everything: no file
// below may have further links.
func (m *model) movable(dir string) bool {
	for p, n := range m.nodes {
		if strings.HasPrefix(p, dir+"/") && (n.frozen || n.links > 1) {
			return false
		}
	}
	return true
}

// drawChange changes content or metadata of what exists.
func (m *model) drawChange(verb string) (Op, bool) {
	content := verb == "write" || verb == "append" || verb == "truncate"
	p := m.pick(func(_ string, n *node) bool {
		switch {
		case n.frozen, content && !n.file, verb == "setxattr" && !n.file && !n.dir, verb == "removexattr" && len(n.xattrs) == 0:
			return false
		}
		return verb != "chmod" || n.file || n.dir
	})
	if p == "" {
		return Op{}, false
	}
	n, op := m.nodes[p], Op{Verb: verb, Path: p}
	switch verb {
	case "write", "append":
		op.Data, op.N = m.data(), m.r.Int64N(20000)
	case "truncate":
		op.N = m.r.Int64N(50000)
	case "chmod":
		if op.Mode = m.mode(); n.dir {
			op.Mode |= 0o700
		}
	case "chown":
		op.Mode = uint32(m.r.IntN(3000))<<16 | uint32(m.r.IntN(3000))
	case "setxattr":
		op.Name, op.Data = fmt.Sprintf("user.x%d", m.r.IntN(4)), []byte(fmt.Sprint(m.r.IntN(1000)))
		if n.xattrs == nil {
			n.xattrs = make(map[string]bool)
		}
		n.xattrs[op.Name] = true
	case "removexattr":
		for _, name := range []string{"user.x0", "user.x1", "user.x2", "user.x3"} {
			if n.xattrs[name] {
				op.Name = name
			}
		}
		delete(n.xattrs, op.Name)
	}
	return op, true
}

func (m *model) mode() uint32 {
	return []uint32{0o644, 0o600, 0o755, 0o4755, 0o2750, 0o1777, 0o444, 0o000, 0o640}[m.r.IntN(9)]
}

// data is empty, small or some pages long.
func (m *model) data() []byte {
	size := []int{0, 1, 100, 4096, 10000, 70000}[m.r.IntN(6)]
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(m.r.Uint32())
	}
	return b
}
