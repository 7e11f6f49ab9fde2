package overlay2

import (
	"bytes"
	"strings"
)

// Difference is a path of a layer that is not what was recorded.
type Difference struct {
	// Path is relative to the layer's root, "." for the root. A whiteout is ".wh.NAME", an opaque directory has
	// ".wh..wh..opq", as in a tar.
	Path string
	// What differs: "missing", "extra" or "type" alone, or some of "mode", "owner", "time", "size", "device",
	// "xattrs", "content" and "target".
	What []string
}

// String returns "path: what, what".
func (d Difference) String() string { return d.Path + ": " + strings.Join(d.What, ", ") }

// order is what digests are sorted by, as archive.Pack sorts a tar: by directory, then by the bytes of the name on
// disk, which for a whiteout is that of what it hides. An opaque mark comes first.
func (d *digest) order() string {
	if d.name == "." {
		return ""
	}
	dir, last := d.name[:strings.LastIndexByte(d.name, '/')+1], d.name[strings.LastIndexByte(d.name, '/')+1:]
	switch d.kind {
	case kindOpaque:
		return dir
	case kindWhiteout:
		return dir + last[len(whiteoutMark):]
	}
	return d.name
}

// compareOrder compares paths so that what is in a directory comes right after it: "a", "a/b", "a.b".
func compareOrder(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		switch {
		case a[i] == b[i]:
		case a[i] == '/' || b[i] != '/' && a[i] < b[i]:
			return -1
		default:
			return 1
		}
	}
	return len(a) - len(b)
}

// differs returns what differs between the digests of one path.
func (d *digest) differs(now *digest) (what []string) {
	if d.kind != now.kind {
		return []string{"type"}
	}
	size, content := "size", "content"
	switch d.kind {
	case "char", "block":
		size = "device"
	case "symlink", "link":
		content = "target"
	}
	for _, f := range []struct{ name, was, now string }{
		{"mode", d.mode, now.mode}, {"owner", d.owner, now.owner}, {"time", d.time, now.time}, {size, d.size, now.size},
		{"xattrs", d.xattrs, now.xattrs}, {content, d.content, now.content},
	} {
		if f.was != f.now {
			what = append(what, f.name)
		}
	}
	return what
}

// comparer compares recorded digests with those of a layer, line by line.
type comparer struct {
	r      *digestReader
	was    []byte // the line at hand, nil after the last
	report func(Difference)
}

func newComparer(r *digestReader, report func(Difference)) (*comparer, error) {
	was, err := r.next()
	return &comparer{r, was, report}, err
}

// advance goes on to the next recorded line.
func (c *comparer) advance() (err error) {
	c.was, err = c.r.next()
	return err
}

// add takes the next line of the layer.
func (c *comparer) add(line []byte) error {
	if bytes.Equal(line, c.was) {
		return c.advance()
	}
	now, err := parseDigest(string(line))
	if err != nil {
		return err
	}
	for c.was != nil {
		was, err := parseDigest(string(c.was))
		if err != nil {
			return corrupt("%s: %w", digestsName, err)
		}
		switch order := compareOrder(was.order(), now.order()); {
		case order == 0:
			if what := was.differs(&now); what != nil {
				c.report(Difference{now.name, what})
			}
			return c.advance()
		case order > 0:
			c.report(Difference{now.name, []string{"extra"}})
			return nil
		}
		c.report(Difference{was.name, []string{"missing"}})
		if err := c.advance(); err != nil {
			return err
		}
	}
	c.report(Difference{now.name, []string{"extra"}})
	return nil
}

// end reports what was recorded and did not come.
func (c *comparer) end() error {
	for c.was != nil {
		was, err := parseDigest(string(c.was))
		if err != nil {
			return corrupt("%s: %w", digestsName, err)
		}
		c.report(Difference{was.name, []string{"missing"}})
		if err := c.advance(); err != nil {
			return err
		}
	}
	return nil
}
