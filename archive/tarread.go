package archive

import (
	"bytes"
	"errors"
	"io"
	"math"
	"strings"
)

// Limits of what one entry's headers may ask for.
const (
	// maxMeta is the longest extended header or long name: 1 MiB, as in Go's archive/tar.
	maxMeta = 1 << 20
	// maxName is the longest name or link target. The kernel takes 4095 bytes at a time;
	// names are resolved by component, so that longer ones work.
	maxName = 64 << 10
	// maxID is the largest owner; 2^32-1 is "no change" to the kernel.
	maxID = math.MaxUint32 - 1
	// Linux keeps 12 bits of a device's major number and 20 of its minor number.
	maxMajor, maxMinor = 1<<12 - 1, 1<<20 - 1
)

// Kinds of entries, by their type flags in a tar (POSIX.1-2001, pax).
const (
	typeReg     = '0'
	typeLink    = '1'
	typeSymlink = '2'
	typeChar    = '3'
	typeBlock   = '4'
	typeDir     = '5'
	typeFifo    = '6'
	typeCont    = '7'
	typeGlobal  = 'g'
	typeExt     = 'x'
	typeGNUName = 'L'
	typeGNULink = 'K'
	typeGNUHole = 'S'
)

// tarTime is a time as seconds and nanoseconds since 1970; nsec is never negative.
type tarTime struct {
	sec  int64
	nsec int64
}

// xattr is one extended attribute.
type xattr struct {
	name  string
	value string
}

// tarEntry is one entry with all its headers taken together.
type tarEntry struct {
	name, link string
	// kind is one of typeReg, typeLink, typeSymlink, typeChar, typeBlock, typeDir, typeFifo.
	kind         byte
	mode         uint32 // permission bits, set-id and sticky: 07777
	uid, gid     uint32
	major, minor uint32
	mtime, atime tarTime
	hasAtime     bool
	// size is the length of the file; of a sparse one, with its holes.
	size   int64
	xattrs []xattr
	// sparse says that only fragments are in the archive, all else is holes.
	sparse    bool
	fragments []fragment
}

// tarReader reads the entries of a tar. After next, body gives what the archive holds
// of the file; next skips what is left of it.
type tarReader struct {
	src stream
	// left is the length of the body not read yet, pad that of the padding behind it.
	left, pad int64
	meta      []byte // holds the extended header in force
	long      []byte // holds a long name
	pax       paxRecords
	global    paxRecords
	ended     bool
}

// next reads up to the next entry, io.EOF at the archive's end: two blocks of zeros or,
// as GNU tar and Go's archive/tar accept it, the end of the stream between two entries.
func (t *tarReader) next(e *tarEntry) error {
	if t.ended {
		return io.EOF
	}
	if err := t.src.skip(t.left); err != nil {
		return t.cut(err)
	}
	if err := t.src.skip(t.pad); err != nil {
		return t.cut(err)
	}
	t.left, t.pad = 0, 0
	t.pax.reset()
	var longName, longLink string
	extended := false
	for {
		h, err := t.header()
		if err == io.EOF {
			t.ended = true
			if extended {
				err = t.cut(io.ErrUnexpectedEOF)
			}
		}
		if err != nil {
			return err
		}
		kind := h.kind()
		switch kind {
		case typeGlobal, typeExt, typeGNUName, typeGNULink:
		default:
			return t.entry(h, kind, longName, longLink, e)
		}
		extended = true
		switch kind {
		case typeGlobal:
			// Only what makes sense for several entries counts of it: owners and times.
			t.global.reset()
			if t.long, err = t.readMeta(h, t.long); err == nil {
				err = t.global.parse(bytes.Clone(t.long))
			}
			extended = false
		case typeExt:
			t.pax.reset()
			if t.meta, err = t.readMeta(h, t.meta); err == nil {
				err = t.pax.parse(t.meta)
			}
		case typeGNUName:
			t.long, err = t.readMeta(h, t.long)
			longName = cString(t.long)
		case typeGNULink:
			t.long, err = t.readMeta(h, t.long)
			longLink = cString(t.long)
		}
		if err != nil {
			return err
		}
	}
}

// header reads the next header block that is not zero.
func (t *tarReader) header() (*tarHeader, error) {
	b, err := t.src.block()
	if err != nil {
		return nil, t.cutHeader(err)
	}
	if isZero(b) {
		b, err = t.src.block()
		if err != nil {
			return nil, t.cutHeader(err)
		}
		if isZero(b) {
			if err := t.src.drain(); err != nil {
				return nil, err
			}
			return nil, io.EOF
		}
		return nil, malformed("a block of zeros between entries, at byte %d", t.src.used()-2*blockSize)
	}
	h := (*tarHeader)(b)
	if !h.checksumOK() {
		at := t.src.used() - blockSize
		if name := compression(b); at == 0 && name != "" {
			return nil, compressed(name)
		}
		return nil, malformed("no header at byte %d: wrong checksum", at)
	}
	return h, nil
}

// cut turns the end of the stream in the wrong place into ErrFormat.
func (t *tarReader) cut(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return malformed("cut off after %d bytes: %w", t.src.used(), err)
	}
	return err
}

// cutHeader turns the end of the stream within a header into ErrFormat; before one it is io.EOF.
func (t *tarReader) cutHeader(err error) error {
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	at := t.src.used()
	if name := compression(t.src.rest()); at == 0 && name != "" {
		return compressed(name)
	}
	return malformed("cut off in the header at byte %d: %w", at, err)
}

// compression returns the name of a format that layers are compressed with if b begins as one does, or "".
func compression(b []byte) string {
	for _, c := range []struct{ name, magic string }{
		{"gzip", "\x1f\x8b"},
		{"zstd", "\x28\xb5\x2f\xfd"},
		{"xz", "\xfd7zXZ\x00"},
		{"bzip2", "BZh"},
	} {
		if strings.HasPrefix(string(b), c.magic) {
			return c.name
		}
	}
	return ""
}

func compressed(name string) error {
	return malformed("no header at byte 0: compressed with %s, decompress it first", name)
}

// readMeta reads the body of an extended header into buf, or a larger one.
func (t *tarReader) readMeta(h *tarHeader, buf []byte) ([]byte, error) {
	size, err := h.number(sizeField)
	if err != nil {
		return nil, malformed("size of an extended header: %w", err)
	}
	if size < 0 || size > maxMeta {
		return nil, malformed("extended header of %d bytes, the limit is %d", size, maxMeta)
	}
	if cap(buf) < int(size) {
		buf = make([]byte, 0, max(size, blockSize))
	}
	meta := buf[:0]
	for left := size; left > 0; {
		b, err := t.src.some(left)
		if err != nil {
			return nil, t.cut(err)
		}
		meta = append(meta, b...)
		left -= int64(len(b))
	}
	return meta, t.cut(t.src.skip(padding(size)))
}

// entry fills e from its header and the extended headers before it.
func (t *tarReader) entry(h *tarHeader, kind byte, longName, longLink string, e *tarEntry) error {
	*e = tarEntry{kind: kind}
	e.name, e.link = h.names()
	size, err := h.fields(e)
	if err != nil {
		return err
	}
	if size, err = t.pax.apply(&t.global, e, size); err != nil {
		return err
	}
	// Go's archive/tar, which Docker unpacks with, lets GNU's names win as well.
	if longName != "" {
		e.name = longName
	}
	if longLink != "" {
		e.link = longLink
	}
	if err := e.checkKind(h.flag(), size); err != nil {
		return err
	}
	if e.kind == typeReg {
		if size < 0 || size > math.MaxInt64-blockSize {
			return malformed("size %d", size)
		}
		e.size, t.left, t.pad = size, size, padding(size)
	}
	if err := t.readSparse(h, kind, e); err != nil {
		return t.cut(err)
	}
	if len(e.name) > maxName || len(e.link) > maxName {
		return malformed("name of %d bytes with a link of %d, the limit is %d", len(e.name), len(e.link), maxName)
	}
	return e.checkNumbers()
}

// checkKind reduces the type flag to one of the seven kinds. An unknown type is an
// error: leaving out what may be a file would be a silent loss.
func (e *tarEntry) checkKind(flag byte, size int64) error {
	switch e.kind {
	case typeReg, typeCont, typeGNUHole:
		e.kind = typeReg
		if !strings.HasSuffix(e.name, "/") {
			return nil
		}
		// V7 has no type for directories. Its flag is NUL; GNU tar takes '0' so, too.
		if flag != 0 && size != 0 {
			return malformed("a file whose name ends in a slash")
		}
		e.kind = typeDir
	case typeLink, typeSymlink, typeChar, typeBlock, typeDir, typeFifo:
	default:
		return malformed("unknown type %q", flag)
	}
	return nil
}

func (e *tarEntry) checkNumbers() error {
	if e.kind != typeChar && e.kind != typeBlock {
		return nil
	}
	if e.major > maxMajor || e.minor > maxMinor {
		return malformed("device %d:%d", e.major, e.minor)
	}
	return nil
}

// body returns the next piece of the entry's body as it is in the archive, in the
// chunk t.src.cur, or nil at its end.
func (t *tarReader) body() ([]byte, error) {
	if t.left == 0 {
		return nil, nil
	}
	b, err := t.src.some(t.left)
	if err != nil {
		return nil, t.cut(err)
	}
	t.left -= int64(len(b))
	return b, nil
}

// padding returns the bytes that fill up the last block of size bytes.
func padding(size int64) int64 { return -size & (blockSize - 1) }

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// cString returns b up to its first NUL.
func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
