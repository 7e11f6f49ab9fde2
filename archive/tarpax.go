package archive

import (
	"bytes"
	"encoding/base64"
	"math"
	"net/url"
	"strconv"
	"strings"
)

// paxRecords are the records of a PAX extended header that mean something to a layer.
// A nil value is none; an empty one takes back what a global header said (POSIX.1-2001, pax).
type paxRecords struct {
	path, linkpath, size, uid, gid, mtime, atime []byte
	xattrs                                       []xattr
	sparse                                       paxSparse
}

func (p *paxRecords) reset() { *p = paxRecords{} }

// Prefixes of extended attributes. star's holds the value as it is, any bytes;
// libarchive's the value in base 64.
const (
	schilyXattr     = "SCHILY.xattr."
	libarchiveXattr = "LIBARCHIVE.xattr."
	// maxXattrs bounds those of one entry. The kernel lists at most 64 KiB of names.
	maxXattrs = 4096
)

// parse reads records of the form "LENGTH KEY=VALUE\n", LENGTH counting all of it. It
// keeps parts of b.
func (p *paxRecords) parse(b []byte) error {
	for len(b) > 0 {
		blank := bytes.IndexByte(b, ' ')
		if blank <= 0 {
			return malformed("extended header: no length in %.20q", b)
		}
		n, ok := parseLength(b[:blank])
		if !ok || n > len(b) || n < blank+len(" k=\n") || b[n-1] != '\n' {
			return malformed("extended header: wrong length in %.20q", b)
		}
		record := b[blank+1 : n-1]
		b = b[n:]
		eq := bytes.IndexByte(record, '=')
		if eq <= 0 {
			return malformed("extended header: no key in %.20q", record)
		}
		if err := p.set(record[:eq], record[eq+1:]); err != nil {
			return err
		}
	}
	return nil
}

// parseLength reads a record's length: digits, and not more than a header can have.
func parseLength(b []byte) (n int, ok bool) {
	for _, c := range b {
		if c < '0' || c > '9' || n > maxMeta {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return n, true
}

// set takes in one record; of these most are "mtime", so that no string is made of a key before it must.
func (p *paxRecords) set(key, value []byte) error {
	switch string(key) {
	case "path":
		p.path = value
		return checkName(value)
	case "linkpath":
		p.linkpath = value
		return checkName(value)
	case "size":
		p.size = value
	case "uid":
		p.uid = value
	case "gid":
		p.gid = value
	case "mtime":
		p.mtime = value
	case "atime":
		p.atime = value
	default:
		return p.setOther(string(key), value)
	}
	return nil
}

func (p *paxRecords) setOther(key string, value []byte) error {
	if strings.IndexByte(key, 0) >= 0 {
		return malformed("extended header: NUL in the key %.40q", key)
	}
	if name, ok := strings.CutPrefix(key, schilyXattr); ok && name != "" {
		return p.setXattr(unescapeKey(name), string(value))
	}
	if name, ok := strings.CutPrefix(key, libarchiveXattr); ok && name != "" {
		return p.setLibarchive(name, value)
	}
	if name, ok := strings.CutPrefix(key, "GNU.sparse."); ok {
		return p.sparse.set(name, value)
	}
	return nil
}

func checkName(name []byte) error {
	if bytes.IndexByte(name, 0) >= 0 {
		return malformed("extended header: NUL in a name")
	}
	return nil
}

// setXattr sets an extended attribute; the last one of a name wins.
func (p *paxRecords) setXattr(name, value string) error {
	for i := range p.xattrs {
		if p.xattrs[i].name == name {
			p.xattrs[i].value = value
			return nil
		}
	}
	if len(p.xattrs) == maxXattrs {
		return malformed("extended header: more than %d xattrs", maxXattrs)
	}
	p.xattrs = append(p.xattrs, xattr{name, value})
	return nil
}

// unescapeKey undoes escapeKey: "=" can't be in a keyword.
func unescapeKey(name string) string {
	if !isEscapedKey(name) {
		return name
	}
	return strings.ReplaceAll(strings.ReplaceAll(name, "%3D", "="), "%25", "%")
}

// isEscapedKey says that a keyword has an escaped "=", however often that was escaped. A "%25" alone is none: Docker
// writes names as they are.
func isEscapedKey(name string) bool {
	for {
		_, after, found := strings.Cut(name, "%")
		if !found {
			return false
		}
		name = after
		for strings.HasPrefix(after, "25") {
			after = after[2:]
		}
		if strings.HasPrefix(after, "3D") {
			return true
		}
	}
}

// apply puts the records into e, where size is the one in its header, and returns the
// size of the body. Of global records the owners and times count.
func (p *paxRecords) apply(global *paxRecords, e *tarEntry, size int64) (int64, error) {
	if len(p.path) > 0 {
		e.name = string(p.path)
	}
	if len(p.linkpath) > 0 {
		e.link = string(p.linkpath)
	}
	e.xattrs = p.xattrs
	if len(p.size) > 0 {
		n, err := strconv.ParseInt(string(p.size), 10, 64)
		if err != nil {
			return 0, malformed("size: %w", err)
		}
		size = n
	}
	for _, id := range []struct {
		what           string
		own, inherited []byte
		to             *uint32
	}{{"uid", p.uid, global.uid, &e.uid}, {"gid", p.gid, global.gid, &e.gid}} {
		if v := orGlobal(id.own, id.inherited); len(v) > 0 {
			n, err := strconv.ParseInt(string(v), 10, 64)
			if err != nil {
				return 0, malformed("%s: %w", id.what, err)
			}
			*id.to = clamp32(n)
		}
		if *id.to > maxID {
			return 0, malformed("%s is out of range", id.what)
		}
	}
	if v := orGlobal(p.mtime, global.mtime); len(v) > 0 {
		t, ok := parseTime(string(v))
		if !ok {
			return 0, malformed("mtime %.40q", v)
		}
		e.mtime = t
	}
	if v := orGlobal(p.atime, global.atime); len(v) > 0 {
		t, ok := parseTime(string(v))
		if !ok {
			return 0, malformed("atime %.40q", v)
		}
		e.atime, e.hasAtime = t, true
	}
	return size, nil
}

func orGlobal(own, global []byte) []byte {
	if own != nil {
		return own
	}
	return global
}

// parseTime reads seconds with a decimal fraction; digits beyond nanoseconds are cut.
func parseTime(s string) (tarTime, bool) {
	whole, frac, _ := strings.Cut(s, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return tarTime{}, false
	}
	var nsec, unit int64 = 0, 1e8
	for i := range len(frac) {
		if frac[i] < '0' || frac[i] > '9' {
			return tarTime{}, false
		}
		nsec += int64(frac[i]-'0') * unit
		unit /= 10
	}
	if whole[0] == '-' && nsec > 0 {
		if sec == math.MinInt64 {
			return tarTime{}, false
		}
		return tarTime{sec - 1, 1e9 - nsec}, true
	}
	return tarTime{sec, nsec}, true
}

// setLibarchive sets an extended attribute as libarchive spells it: the name with %XX
// escapes, the value in base 64 without padding. bsdtar writes SCHILY.xattr as well, which is exact and wins.
func (p *paxRecords) setLibarchive(name string, value []byte) error {
	name, err := url.PathUnescape(name)
	if err != nil || strings.IndexByte(name, 0) >= 0 {
		return malformed("extended header: name of a libarchive xattr")
	}
	raw, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(string(value), "="))
	if err != nil {
		return malformed("extended header: xattr %.40q: %w", name, err)
	}
	for i := range p.xattrs {
		if p.xattrs[i].name == name {
			return nil
		}
	}
	return p.setXattr(name, string(raw))
}
