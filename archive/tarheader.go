package archive

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"strconv"
)

// tarHeader is a header block. Its fields, in the order of POSIX.1-1988 (ustar):
// name 100, mode 8, uid 8, gid 8, size 12, mtime 12, checksum 8, type 1, link 100,
// magic 6, version 2, uname 32, gname 32, major 8, minor 8, prefix 155. GNU has its own
// fields in place of the prefix: atime 12, ctime 12, offset 12, longnames 4, 1 unused,
// four sparse fragments of 24, a flag that more follow, the real size 12.
type tarHeader [blockSize]byte

// field is a place in the header.
type field struct{ at, size int }

var (
	nameField     = field{0, 100}
	modeField     = field{100, 8}
	uidField      = field{108, 8}
	gidField      = field{116, 8}
	sizeField     = field{124, 12}
	mtimeField    = field{136, 12}
	checksumField = field{148, 8}
	linkField     = field{157, 100}
	magicField    = field{257, 8}
	majorField    = field{329, 8}
	minorField    = field{337, 8}
	prefixField   = field{345, 155}
	// star keeps times behind a shorter prefix, and a magic at the block's end.
	starPrefixField = field{345, 131}
	starMagicField  = field{508, 4}
	gnuAtimeField   = field{345, 12}
	gnuCtimeField   = field{357, 12}
	gnuSparseField  = field{386, 4 * fragmentSize}
	gnuMoreField    = field{482, 1}
	gnuRealField    = field{483, 12}
)

func (h *tarHeader) bytes(f field) []byte { return h[f.at : f.at+f.size] }

// flag is the type flag as it is; kind takes NUL, V7's, for a regular file.
func (h *tarHeader) flag() byte { return h[156] }

func (h *tarHeader) kind() byte {
	if h.flag() == 0 {
		return typeReg
	}
	return h.flag()
}

func (h *tarHeader) isGNU() bool { return string(h.bytes(magicField)) == "ustar  \x00" }

func (h *tarHeader) isUSTAR() bool { return string(h.bytes(magicField)[:6]) == "ustar\x00" }

// checksumOK compares the checksum with the sum of all bytes, its own taken as blanks.
// Old tars summed signed bytes.
func (h *tarHeader) checksumOK() bool {
	want, err := parseOctal(h.bytes(checksumField))
	if err != nil {
		return false
	}
	field := checksumField
	sum := sumBytes(h[:field.at]) + sumBytes(h[field.at+field.size:]) + int64(field.size)*' '
	if want == sum {
		return true
	}
	for _, c := range h {
		sum -= int64(c>>7) << 8
	}
	for _, c := range h.bytes(field) {
		sum += int64(c>>7) << 8
	}
	return want == sum
}

// sumBytes adds up the bytes of b, which are less than 512, eight at a time: as four 16-bit
// numbers, which hold 64 times two bytes.
func sumBytes(b []byte) int64 {
	var lanes uint64
	for ; len(b) >= 8; b = b[8:] {
		w := binary.LittleEndian.Uint64(b)
		lanes += w&0x00ff00ff00ff00ff + w>>8&0x00ff00ff00ff00ff
	}
	sum := int64(lanes&0xffff + lanes>>16&0xffff + lanes>>32&0xffff + lanes>>48)
	for _, c := range b {
		sum += int64(c)
	}
	return sum
}

func (h *tarHeader) number(f field) (int64, error) { return parseNumber(h.bytes(f)) }

// fields reads the numbers of the header into e and returns the size.
func (h *tarHeader) fields(e *tarEntry) (size int64, err error) {
	read := func(what string, f field) (n int64) {
		if err != nil {
			return 0
		}
		if n, err = h.number(f); err != nil {
			err = malformed("%s: %w", what, err)
		}
		return n
	}
	e.mode = uint32(read("mode", modeField) & 0o7777)
	uid, gid := read("uid", uidField), read("gid", gidField)
	size = read("size", sizeField)
	e.mtime.sec = read("mtime", mtimeField)
	if (e.kind == typeChar || e.kind == typeBlock) && (h.isUSTAR() || h.isGNU()) {
		major, minor := read("major", majorField), read("minor", minorField)
		// Out of range stays out of range, for checkNumbers.
		e.major, e.minor = clamp32(major), clamp32(minor)
	}
	e.uid, e.gid = clamp32(uid), clamp32(gid)
	return size, err
}

// clamp32 maps what is no uint32 to its largest value, which is never valid here.
func clamp32(n int64) uint32 {
	if n < 0 || n > math.MaxUint32 {
		return math.MaxUint32
	}
	return uint32(n)
}

// names returns the name with its prefix, and the link's target.
func (h *tarHeader) names() (name, link string) {
	name, link = cString(h.bytes(nameField)), cString(h.bytes(linkField))
	prefix := ""
	switch {
	case h.isUSTAR() && string(h.bytes(starMagicField)) == "tar\x00":
		prefix = cString(h.bytes(starPrefixField))
	case h.isUSTAR():
		prefix = cString(h.bytes(prefixField))
	case h.isGNU() && h.gnuWithPrefix():
		prefix = cString(h.bytes(prefixField))
	}
	if prefix != "" {
		name = prefix + "/" + name
	}
	return name, link
}

// gnuWithPrefix says that a GNU header has a prefix all the same, where its times
// belong: Go before 1.8, and with it Docker's older images, wrote such headers for long names.
func (h *tarHeader) gnuWithPrefix() bool {
	for _, f := range []field{gnuAtimeField, gnuCtimeField} {
		if h[f.at] == 0 {
			continue
		}
		if _, err := h.number(f); err != nil {
			prefix := cString(h.bytes(prefixField))
			return bytes.IndexFunc([]byte(prefix), func(r rune) bool { return r >= 0x80 }) < 0
		}
	}
	return false
}

// parseNumber reads octal digits or, with the first bit set, GNU's base 256 in two's complement.
func parseNumber(b []byte) (int64, error) {
	if b[0]&0x80 == 0 {
		return parseOctal(b)
	}
	negative := b[0]&0x40 != 0
	var n uint64
	for i, c := range b {
		if negative {
			c = ^c
		}
		if i == 0 {
			c &= 0x7f
		}
		if n>>56 != 0 {
			return 0, fmt.Errorf("number %x is out of range", b)
		}
		n = n<<8 | uint64(c)
	}
	if n > math.MaxInt64 {
		return 0, fmt.Errorf("number %x is out of range", b)
	}
	if negative {
		return ^int64(n), nil
	}
	return int64(n), nil
}

// parseOctal reads octal digits between blanks or NULs; none are 0.
func parseOctal(b []byte) (int64, error) {
	b = bytes.Trim(b, " \x00")
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	var n int64
	for _, c := range b {
		if c < '0' || c > '7' || n > math.MaxInt64>>3 {
			return 0, fmt.Errorf("%s is no octal number", strconv.Quote(string(b)))
		}
		n = n<<3 | int64(c-'0')
	}
	return n, nil
}
