package overlay2

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// The digests of a layer: a line of text for each entry of its tar, in the order of the tar, between these two.
// The last one has the number of entries and the SHA-256 of all lines before it. docs/format.md has the fields.
const (
	digestsName = "digests"
	digestsHead = "overlay2 digests 1\n"
	digestsEnd  = "end "
	// maxDigestLine bounds what a damaged file can make us hold. A tar header has 1 MiB of names at most, and quoting
	// makes four bytes of one.
	maxDigestLine = 8 << 20
	opaqueMark    = ".wh..wh..opq"
	whiteoutMark  = ".wh."
	// applyHoles is how much of a layer's holes an apply hashes to record digests: what two minutes are enough for. A SHA-256
	// knows no short way over zeros, and a tar of 3 KiB can make 16 TiB of them.
	applyHoles = 64 << 30
)

// errManyHoles says that the holes of a layer's files are longer than what is to be hashed of them.
var errManyHoles = errors.New("too much of the layer is holes")

// digestKinds are the names of types in digests. Marks have names of their own.
var digestKinds = map[byte]string{
	tar.TypeReg: "file", tar.TypeDir: "dir", tar.TypeSymlink: "symlink", tar.TypeLink: "link", tar.TypeFifo: "fifo",
	tar.TypeChar: "char", tar.TypeBlock: "block",
}

const (
	kindWhiteout = "whiteout"
	kindOpaque   = "opaque"
)

// digester makes lines of tar entries.
type digester struct {
	sum  hash.Hash
	buf  []byte // for copying
	line []byte // the last one
	root bool   // it is the root's
	// ended, unless it is nil, is asked while content is hashed: a hole is read without the stream, which may end.
	ended func() error
	// holes is how much of holes may yet be hashed. That is errManyHoles otherwise.
	holes  int64
	stream countingReader
}

func newDigester() *digester {
	return &digester{sum: sha256.New(), buf: make([]byte, 256<<10), holes: math.MaxInt64}
}

// countingReader counts what is read.
type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// each calls f with the line of each entry of a tar, valid during the call.
func (s *digester) each(stream io.Reader, f func(line []byte) error) error {
	s.stream = countingReader{r: stream}
	for r := tar.NewReader(&s.stream); ; {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = s.entry(h, r)
		}
		if err == nil {
			err = f(s.line)
		}
		if err != nil {
			return err
		}
	}
}

// entry makes the line of a tar entry, and reads its content to the end.
func (s *digester) entry(h *tar.Header, content io.Reader) error {
	name := strings.TrimSuffix(h.Name, "/")
	kind := digestKinds[h.Typeflag]
	switch last := name[strings.LastIndexByte(name, '/')+1:]; {
	case kind == "":
		return fmt.Errorf("%q: type %q", h.Name, h.Typeflag)
	case last == opaqueMark:
		kind = kindOpaque
	case strings.HasPrefix(last, whiteoutMark): // archive.Pack refuses files of such names
		kind = kindWhiteout
	}
	b := append(append(s.line[:0], kind...), ' ')
	sec, nsec := h.ModTime.Unix(), h.ModTime.Nanosecond()
	if name == "." {
		sec, nsec = 0, 0 // a layer's root has no time of its own, as in its tar
	}
	b = fmt.Appendf(b, "%04o %d:%d %d.%09d ", h.Mode, h.Uid, h.Gid, sec, nsec)
	if kind == "char" || kind == "block" {
		b = append(strconv.AppendInt(b, h.Devmajor, 10), ',')
		b = strconv.AppendInt(b, h.Devminor, 10)
	} else {
		b = strconv.AppendInt(b, h.Size, 10)
	}
	if b = append(b, ' '); kind == "link" {
		b = append(b, '-') // they are in the line of the file's first name
	} else {
		b = s.xattrs(b, h.PAXRecords)
	}
	b = append(strconv.AppendQuote(append(b, ' '), name), ' ')
	switch kind {
	case "file":
		if err := s.hash(content); err != nil {
			return err
		}
		b = s.appendSum(b)
	case "symlink", "link":
		b = strconv.AppendQuote(b, h.Linkname)
	default:
		b = append(b, '-')
	}
	b = append(b, '\n')
	s.line, s.root = b, name == "."
	return nil
}

// hash reads the content of a file to its end into the sum. What does not come from the stream is a hole.
func (s *digester) hash(content io.Reader) error {
	s.sum.Reset()
	for {
		if s.ended != nil {
			if err := s.ended(); err != nil {
				return err
			}
		}
		before := s.stream.n
		n, err := content.Read(s.buf)
		_, _ = s.sum.Write(s.buf[:n]) // a hash takes everything
		if s.holes -= int64(n) - (s.stream.n - before); s.holes < 0 {
			return errManyHoles
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// xattrs appends the digest of the extended attributes among the records of an entry.
func (s *digester) xattrs(b []byte, records map[string]string) []byte {
	s.sum.Reset()
	found := false
	for _, key := range slices.Sorted(maps.Keys(records)) {
		if strings.HasPrefix(key, "SCHILY.") {
			_, _ = fmt.Fprintf(s.sum, "%d %d %s%s", len(key), len(records[key]), key, records[key]) // a hash takes everything
			found = true
		}
	}
	if !found {
		return append(b, '-')
	}
	return s.appendSum(b)
}

func (s *digester) appendSum(b []byte) []byte {
	var sum [sha256.Size]byte
	return hex.AppendEncode(b, s.sum.Sum(sum[:0]))
}

// digest is a line taken apart.
type digest struct {
	kind, mode, owner, time, size, xattrs, name, content string
}

// parseDigest reads a line. What entry would not write is an error.
func parseDigest(line string) (d digest, err error) {
	bad := func(what string) (digest, error) { return d, fmt.Errorf("line %.200q: %s", line, what) }
	words := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 7)
	if len(words) != 7 {
		return bad("fields are missing")
	}
	d = digest{kind: words[0], mode: words[1], owner: words[2], time: words[3], size: words[4], xattrs: words[5]}
	quoted, err := strconv.QuotedPrefix(words[6])
	if err != nil {
		return bad("name is not quoted")
	}
	var ok bool
	if d.name, ok = unquote(quoted); !ok || d.name == "" {
		return bad("name is not quoted")
	}
	if d.content, ok = strings.CutPrefix(words[6][len(quoted):], " "); !ok || !goodContent(d.kind, d.content) {
		return bad("content")
	}
	last := d.name[strings.LastIndexByte(d.name, '/')+1:]
	if (d.kind == kindOpaque) != (last == opaqueMark) || (d.kind == kindWhiteout) != (last != opaqueMark && strings.HasPrefix(last, whiteoutMark)) {
		return bad("type")
	}
	_, err = strconv.ParseUint(d.mode, 8, 32)
	if err != nil || len(d.mode) < 4 || !numbers(d.owner, ':') || !numbers(strings.TrimPrefix(d.time, "-"), '.') ||
		!numbers(d.size, ',') && !numbers("0,"+d.size, ',') || d.xattrs != "-" && !isSum(d.xattrs) {
		return bad("metadata")
	}
	return d, nil
}

// goodContent reports whether a kind of file can have such a last field.
func goodContent(kind, content string) bool {
	switch kind {
	case "file":
		return isSum(content)
	case "symlink", "link":
		_, ok := unquote(content)
		return ok
	case "dir", "fifo", "char", "block", kindWhiteout, kindOpaque:
		return content == "-"
	}
	return false
}

// unquote reads what strconv.Quote writes.
func unquote(quoted string) (string, bool) {
	s, err := strconv.Unquote(quoted)
	return s, err == nil && strconv.Quote(s) == quoted
}

// numbers reports whether s is two numbers with sep between.
func numbers(s string, sep byte) bool {
	a, b, ok := strings.Cut(s, string(sep))
	digits := func(r rune) bool { return r < '0' || r > '9' }
	return ok && a != "" && b != "" && strings.IndexFunc(a+b, digits) < 0
}

// isSum reports whether s is a SHA-256.
func isSum(s string) bool {
	return len(s) == 2*sha256.Size && strings.Trim(s, "0123456789abcdef") == ""
}

// digestWriter writes lines, with the first and the last one.
type digestWriter struct {
	w   *bufio.Writer
	sum hash.Hash
	n   int
}

func newDigestWriter(w io.Writer) (*digestWriter, error) {
	d := &digestWriter{w: bufio.NewWriterSize(w, 64<<10), sum: sha256.New()}
	err := d.write([]byte(digestsHead))
	return d, err
}

func (d *digestWriter) write(line []byte) error {
	_, _ = d.sum.Write(line) // a hash takes everything
	_, err := d.w.Write(line)
	return err
}

func (d *digestWriter) add(line []byte) error {
	d.n++
	return d.write(line)
}

// end writes the last line.
func (d *digestWriter) end() error {
	if _, err := fmt.Fprintf(d.w, "%s%d %x\n", digestsEnd, d.n, d.sum.Sum(nil)); err != nil {
		return err
	}
	return d.w.Flush()
}

// digestReader reads recorded digests.
type digestReader struct {
	r    *bufio.Reader
	sum  hash.Hash
	n    int
	long []byte // a line that is longer than the reader's buffer
}

func newDigestReader(r io.Reader) (*digestReader, error) {
	d := &digestReader{r: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
	head, err := d.line()
	if err == nil && string(head) != digestsHead {
		err = fmt.Errorf("begins with %.200q", head)
	}
	if err != nil {
		return nil, corrupt("%s: %w", digestsName, err)
	}
	_, _ = d.sum.Write(head) // a hash takes everything
	return d, nil
}

// line returns the next line, valid until the call after.
func (d *digestReader) line() ([]byte, error) {
	line, err := d.r.ReadSlice('\n')
	for d.long = d.long[:0]; errors.Is(err, bufio.ErrBufferFull); {
		if len(d.long) > maxDigestLine {
			return nil, fmt.Errorf("a line of more than %d bytes", maxDigestLine)
		}
		d.long = append(d.long, line...)
		line, err = d.r.ReadSlice('\n')
		if err == nil {
			line = append(d.long, line...)
			d.long = line
		}
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return line, err
}

// next returns the next line, valid until the call after; nil after the last. What is not whole is ErrCorrupt.
func (d *digestReader) next() ([]byte, error) {
	line, err := d.line()
	if err == nil && bytes.HasPrefix(line, []byte(digestsEnd)) {
		line, err = nil, d.end(line)
	}
	if err != nil {
		return nil, corrupt("%s: %w", digestsName, err)
	}
	if line != nil {
		_, _ = d.sum.Write(line) // a hash takes everything
		d.n++
	}
	return line, nil
}

func (d *digestReader) end(line []byte) error {
	if string(line) != fmt.Sprintf("%s%d %x\n", digestsEnd, d.n, d.sum.Sum(nil)) {
		return errors.New("its own digest is another")
	}
	if _, err := d.r.ReadByte(); err != io.EOF {
		return errors.New("goes on after its end")
	}
	return nil
}

// check reads to the end. It returns ErrCorrupt unless all is as digestWriter writes it.
func (d *digestReader) check(ended func() error) error {
	last := ""
	for first := true; ; first = false {
		if err := ended(); err != nil {
			return err
		}
		line, err := d.next()
		if err != nil || line == nil && !first {
			return err
		}
		e, err := parseDigest(string(line))
		if err == nil && (first != (e.name == ".") || !first && compareOrder(last, e.order()) >= 0) {
			err = fmt.Errorf("line %.200q: not in order", line)
		}
		if err != nil {
			return corrupt("%s: %w", digestsName, err)
		}
		last = e.order()
	}
}
