package archive

import (
	"bytes"
	"encoding/binary"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Sizes of the two fields for a name in USTAR.
const (
	nameSize   = 100
	prefixSize = 155
)

// Largest numbers in a field of seven or eleven octal digits.
const (
	maxOctal7  = 1<<21 - 1
	maxOctal11 = 1<<33 - 1
)

// packHeader is one entry as the writer needs it. The slices are only read.
type packHeader struct {
	// name ends in a slash if it is a directory.
	name, link   []byte
	typ          byte
	mode         uint32 // permissions with setuid, setgid and sticky: no type
	uid, gid     uint32
	major, minor uint32
	// size is the number of bytes that follow the header, before padding.
	size int64
	// mtimeNsec counts forward from mtime, also before 1970.
	mtime     int64
	mtimeNsec uint32
	xattrs    []tarXattr
	// sparse says that what follows is a map of fragments and then the fragments (GNU.sparse
	// 1.0), of a file that is realSize long.
	sparse   bool
	realSize int64
}

// tarXattr is an extended attribute, written as a PAX record SCHILY.xattr.NAME.
type tarXattr struct{ name, value string }

// headerWriter formats headers: USTAR where that holds everything, with a PAX header in
// front where it doesn't. It keeps its buffer.
type headerWriter struct{ pax []byte }

// append formats h behind dst. The same header always gives the same bytes.
func (w *headerWriter) append(dst []byte, h *packHeader) []byte {
	w.pax = w.pax[:0]
	prefix, name, fits := splitName(h.name)
	if h.sparse {
		w.sparse(h)
		prefix, name, fits = splitName(sparseName(h.name))
		if !fits {
			prefix, name = nil, sparseName(baseName(h.name))
			name = name[:min(len(name), nameSize)]
		}
	} else if !fits {
		w.record("path", h.name)
		// Readers that know PAX don't look at this name; others find something of it.
		prefix, name = nil, baseName(h.name)
		name = name[:min(len(name), nameSize)]
	}
	link := h.link
	if len(link) > nameSize {
		w.record("linkpath", link)
		link = link[:nameSize]
	}
	uid := w.number("uid", int64(h.uid), maxOctal7)
	gid := w.number("gid", int64(h.gid), maxOctal7)
	size := w.number("size", h.size, maxOctal11)
	mtime := w.time(h.mtime, h.mtimeNsec)
	for _, x := range h.xattrs {
		switch x.name {
		case xattrACL:
			w.acl("SCHILY.acl.access", x.value)
		case xattrDefaultACL:
			w.acl("SCHILY.acl.default", x.value)
		}
		w.record(schilyXattr+escapeKey(x.name), []byte(x.value))
	}
	if len(w.pax) > 0 {
		dst = w.appendPAX(dst, h.name)
	}
	dst, b := newBlock(dst)
	copy(b[0:], name)
	octal(b[100:108], int64(h.mode))
	octal(b[108:116], uid)
	octal(b[116:124], gid)
	octal(b[124:136], size)
	octal(b[136:148], mtime)
	b[156] = h.typ
	copy(b[157:257], link)
	octal(b[329:337], int64(h.major))
	octal(b[337:345], int64(h.minor))
	copy(b[345:500], prefix)
	finish(b)
	return dst
}

// appendPAX writes the records as an entry of their own.
func (w *headerWriter) appendPAX(dst, name []byte) []byte {
	if !utf8.Valid(w.pax) && needsBinary(w.pax) {
		w.record("hdrcharset", []byte("BINARY"))
	}
	dst, b := newBlock(dst)
	n := copy(b[0:100], "PaxHeaders.0/")
	copy(b[n:100], baseName(name))
	octal(b[100:108], 0o644)
	octal(b[108:116], 0)
	octal(b[116:124], 0)
	octal(b[124:136], int64(len(w.pax)))
	octal(b[136:148], 0)
	b[156] = typeExt
	octal(b[329:337], 0)
	octal(b[337:345], 0)
	finish(b)
	dst = append(dst, w.pax...)
	return append(dst, zeros[:padding(int64(len(w.pax)))]...)
}

// needsBinary says whether a name in the records is not UTF-8, which PAX demands unless
// hdrcharset says otherwise; values of xattrs are bytes anyway.
func needsBinary(pax []byte) bool {
	for len(pax) > 0 {
		length, rest, _ := bytes.Cut(pax, []byte(" "))
		n, err := strconv.Atoi(string(length))
		if err != nil || n > len(pax) || n <= len(length) {
			return true
		}
		record := rest[:n-len(length)-1]
		pax = pax[n:]
		if !bytes.HasPrefix(record, []byte(schilyXattr)) && !utf8.Valid(record) {
			return true
		}
	}
	return false
}

// number returns v for an octal field if it fits; if not, it writes a record and returns 0.
func (w *headerWriter) number(key string, v, limit int64) int64 {
	if v <= limit {
		return v
	}
	w.record(key, strconv.AppendInt(nil, v, 10))
	return 0
}

// time returns the seconds for the header, with a record for what they cannot say.
func (w *headerWriter) time(sec int64, nsec uint32) int64 {
	if nsec == 0 && sec >= 0 && sec <= maxOctal11 {
		return sec
	}
	var buf [40]byte
	w.record("mtime", appendTime(buf[:0], sec, nsec))
	return min(max(sec, 0), maxOctal11)
}

// appendTime formats a time as PAX has it, a decimal fraction with a sign: -1.25 is
// a second and a quarter before 1970, in the kernel's count sec -2 and nsec 750000000.
func appendTime(dst []byte, sec int64, nsec uint32) []byte {
	whole := uint64(sec)
	if sec < 0 {
		dst = append(dst, '-')
		whole = -whole // of the least one there is no int64
		if nsec > 0 {
			whole--
			nsec = 1e9 - nsec
		}
	}
	dst = strconv.AppendUint(dst, whole, 10)
	if nsec == 0 {
		return dst
	}
	digits := strconv.AppendInt(nil, int64(nsec)+1e9, 10) // 1 and nine digits
	return append(append(dst, '.'), bytes.TrimRight(digits[1:], "0")...)
}

// sparse writes the records of GNU's sparse format 1.0.
func (w *headerWriter) sparse(h *packHeader) {
	w.record("GNU.sparse.major", []byte("1"))
	w.record("GNU.sparse.minor", []byte("0"))
	w.record("GNU.sparse.name", h.name)
	w.record("GNU.sparse.realsize", strconv.AppendInt(nil, h.realSize, 10))
}

// acl writes a POSIX ACL as text, beside the xattr that holds it as Linux has it: this is what
// bsdtar reads, and GNU tar with --acls.
func (w *headerWriter) acl(key, value string) {
	text := make([]byte, 0, 128)
	for e := []byte(value)[min(aclHeader, len(value)):]; len(e) >= aclEntry; e = e[aclEntry:] {
		tag, perm, id := binary.LittleEndian.Uint16(e), binary.LittleEndian.Uint16(e[2:]), binary.LittleEndian.Uint32(e[4:])
		if len(text) > 0 {
			text = append(text, ',')
		}
		switch tag {
		case aclUserObj, aclUser:
			text = append(text, "user:"...)
		case aclGroupObj, aclGroup:
			text = append(text, "group:"...)
		case aclMask:
			text = append(text, "mask:"...)
		case aclOther:
			text = append(text, "other:"...)
		default:
			return // a kind that this form doesn't have
		}
		if tag == aclUser || tag == aclGroup {
			text = strconv.AppendUint(text, uint64(id), 10)
		}
		text = append(text, ':')
		for i, c := range []byte("rwx") {
			if perm&(4>>i) == 0 {
				c = '-'
			}
			text = append(text, c)
		}
	}
	w.record(key, text)
}

// Tags of ACL entries beside aclUser and aclGroup (include/uapi/linux/posix_acl.h).
const (
	aclUserObj  = 0x01
	aclGroupObj = 0x04
	aclMask     = 0x10
	aclOther    = 0x20
)

// sparseName is the name by which a reader that doesn't know sparse files unpacks one.
func sparseName(name []byte) []byte {
	dir := name[:len(name)-len(baseName(name))]
	return append(append(bytes.Clone(dir), "GNUSparseFile.0/"...), baseName(name)...)
}

// record adds "LENGTH KEY=VALUE\n"; the length counts itself.
func (w *headerWriter) record(key string, value []byte) {
	rest := len(key) + len(value) + 3 // blank, =, newline
	n := rest + decimals(rest)
	n = rest + decimals(n)
	w.pax = strconv.AppendInt(w.pax, int64(n), 10)
	w.pax = append(w.pax, ' ')
	w.pax = append(w.pax, key...)
	w.pax = append(w.pax, '=')
	w.pax = append(w.pax, value...)
	w.pax = append(w.pax, '\n')
}

func decimals(n int) int {
	d := 1
	for ; n >= 10; n /= 10 {
		d++
	}
	return d
}

// escapeKey makes the name of an xattr a keyword, which ends at the first "=": as GNU tar does, but
// only where the name has one or would be taken for escaped, as other readers know no escapes.
func escapeKey(name string) string {
	if !strings.Contains(name, "=") && !isEscapedKey(name) {
		return name
	}
	return strings.ReplaceAll(strings.ReplaceAll(name, "%", "%25"), "=", "%3D")
}

// baseName returns the last component, with its trailing slash.
func baseName(name []byte) []byte {
	end := len(name)
	if end > 0 && name[end-1] == '/' {
		end--
	}
	return name[bytes.LastIndexByte(name[:end], '/')+1:]
}

// splitName splits a name at a slash into USTAR's two fields. Names are bytes here: USTAR
// says nothing of their meaning, and every reader takes them as they are.
func splitName(name []byte) (prefix, rest []byte, ok bool) {
	if len(name) <= nameSize {
		return nil, name, true
	}
	if len(name) > prefixSize+1+nameSize {
		return nil, nil, false
	}
	// The leftmost slash that leaves a rest short enough; the rest must not be empty.
	from := len(name) - nameSize - 1
	i := bytes.IndexByte(name[from:len(name)-1], '/')
	if i < 0 || from+i == 0 || from+i > prefixSize {
		return nil, nil, false
	}
	return name[:from+i], name[from+i+1:], true
}

var zeros [2 * blockSize]byte

// newBlock adds a block of zeros to dst and returns both.
func newBlock(dst []byte) (grown, block []byte) {
	dst = append(dst, zeros[:blockSize]...)
	return dst, dst[len(dst)-blockSize:]
}

// octal fills a field with digits and a NUL. v is known to fit.
func octal(field []byte, v int64) {
	for i := len(field) - 2; i >= 0; i-- {
		field[i] = byte('0' + v&7)
		v >>= 3
	}
}

// finish writes the magic and the checksum.
func finish(b []byte) {
	copy(b[257:265], "ustar\x0000")
	copy(b[148:156], "        ")
	octal(b[148:155], sumBytes(b[:blockSize]))
	b[154] = 0 // before the last blank: as POSIX has this field, and no other
}
