package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// readEntry is what a reader says of an entry.
type readEntry struct {
	name, link string
	kind       byte
	mode       int64
	uid, gid   int64
	size       int64
	mtime      tarTime
	major      int64
	minor      int64
	body       string
	xattrs     string
}

// maxFuzzBody is how much of a file is compared.
const maxFuzzBody = 1 << 16

// readOurs reads a stream with the reader of this package, until the first error.
func readOurs(r io.Reader) (entries []readEntry, err error) {
	t := tarReader{src: stream{ctx: context.Background(), r: r, alloc: func() (*chunk, error) {
		c := &chunk{buf: make([]byte, 16*blockSize), free: func(*chunk) {}}
		c.refs.Store(1)
		return c, nil
	}}}
	defer t.src.close()
	for {
		var e tarEntry
		if err := t.next(&e); err != nil {
			if err == io.EOF {
				err = nil
			}
			return entries, err
		}
		out := readEntry{
			name: e.name, link: e.link, kind: e.kind, mode: int64(e.mode), uid: int64(e.uid), gid: int64(e.gid),
			size: e.size, mtime: e.mtime, major: int64(e.major), minor: int64(e.minor),
		}
		for _, x := range e.xattrs {
			out.xattrs += fmt.Sprintf("%q=%q\n", x.name, x.value)
		}
		var body []byte
		for {
			b, err := t.body()
			if err != nil {
				return entries, err
			}
			if b == nil {
				break
			}
			body = append(body, b...)
		}
		out.body = e.expand(body)
		entries = append(entries, out)
	}
}

// expand returns the start of a file whose data is body.
func (e *tarEntry) expand(body []byte) string {
	if !e.sparse {
		return string(body[:min(len(body), maxFuzzBody)])
	}
	out := make([]byte, min(e.size, maxFuzzBody))
	for _, f := range e.fragments {
		if f.offset < int64(len(out)) {
			copy(out[f.offset:], body[:f.length])
		}
		body = body[f.length:]
	}
	return string(out)
}

// readTheirs reads a stream with Go's archive/tar, until the first error.
func readTheirs(stream []byte) (entries []readEntry, err error) {
	r := tar.NewReader(bytes.NewReader(stream))
	for {
		h, err := r.Next()
		if err != nil {
			if err == io.EOF {
				err = nil
			}
			return entries, err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		out := readEntry{
			name: h.Name, link: h.Linkname, kind: h.Typeflag, mode: h.Mode & 0o7777, uid: int64(h.Uid), gid: int64(h.Gid),
			mtime: tarTime{h.ModTime.Unix(), int64(h.ModTime.Nanosecond())},
		}
		switch out.kind {
		case tar.TypeChar, tar.TypeBlock:
			out.major, out.minor = h.Devmajor, h.Devminor
		case tar.TypeCont, tar.TypeGNUSparse, tar.TypeReg:
			out.kind = tar.TypeReg
			out.size = h.Size
			if strings.HasSuffix(h.Name, "/") {
				out.kind = tar.TypeDir
			}
		}
		var xattrs []string
		for key, value := range h.PAXRecords {
			if name, ok := strings.CutPrefix(key, schilyXattr); ok && name != "" {
				xattrs = append(xattrs, fmt.Sprintf("%q=%q\n", unescapeKey(name), value))
			}
		}
		slices.Sort(xattrs)
		out.xattrs = strings.Join(xattrs, "")
		body, err := io.ReadAll(io.LimitReader(r, maxFuzzBody))
		if err == nil && h.Size < 1<<30 {
			_, err = io.Copy(io.Discard, r)
		}
		if err != nil {
			return entries, err
		}
		out.body = string(body)
		entries = append(entries, out)
	}
}

// compareReaders reads a stream with both and fails where this package's reader is more
// lenient or says something else. It may be stricter.
func compareReaders(t *testing.T, stream []byte) {
	t.Helper()
	ours, err := readOurs(bytes.NewReader(stream))
	if err != nil {
		if !errors.Is(err, ErrFormat) {
			t.Fatalf("%v is no ErrFormat", err)
		}
		return
	}
	theirs, err := readTheirs(stream)
	if err != nil && knownLenient(stream) {
		return
	}
	if err != nil {
		t.Fatalf("archive/tar says %v, we nothing; after %+v", err, ours)
	}
	if len(ours) != len(theirs) {
		t.Fatalf("%d entries, archive/tar has %d", len(ours), len(theirs))
	}
	for i, o := range ours {
		th := theirs[i]
		lines := strings.SplitAfter(o.xattrs, "\n")
		slices.Sort(lines)
		o.xattrs = strings.Join(lines, "")
		if bytes.Contains(stream, []byte(libarchiveXattr)) {
			o.xattrs, th.xattrs = "", ""
		}
		if th.kind == tar.TypeDir && o.kind == tar.TypeDir || o.kind != typeReg {
			o.size, th.size, o.body, th.body = 0, 0, "", ""
		}
		if hasGlobal(stream) {
			o.uid, o.gid, o.mtime, th.uid, th.gid, th.mtime = 0, 0, tarTime{}, 0, 0, tarTime{}
		}
		if o != th {
			t.Fatalf("entry %d is\n%+v, archive/tar has\n%+v", i, o, th)
		}
	}
}

func hasGlobal(stream []byte) bool {
	for at := 0; at+blockSize <= len(stream); at += blockSize {
		if stream[at+156] == typeGlobal {
			return true
		}
	}
	return false
}

// knownLenient says that archive/tar may refuse what does not matter here: device numbers
// of what is no device, times and names that are not used, owners of extended headers.
func knownLenient(stream []byte) bool {
	for at := 0; at+blockSize <= len(stream); at += blockSize {
		h := (*tarHeader)(stream[at:])
		_, err1 := h.number(majorField)
		_, err2 := h.number(minorField)
		if err1 != nil || err2 != nil || string(h.bytes(starMagicField)) == "tar\x00" {
			return true
		}
		var e tarEntry
		if _, err := h.fields(&e); err != nil && strings.IndexByte("xgLK", h.flag()) >= 0 {
			return true
		}
	}
	for _, word := range []string{"ctime=", "atime=", "uname=", "gname=", "SCHILY", "GNU.sparse"} {
		if bytes.Contains(stream, []byte(word)) {
			return true
		}
	}
	return false
}

// caseTars returns the streams of testdata/unpack.
func caseTars(t testing.TB) (tars [][]byte) {
	t.Helper()
	files, err := filepath.Glob("testdata/unpack/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no cases", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, text, _ := strings.Cut(string(data), "-- tar --\n")
		text, _, _ = strings.Cut("\n"+text, "\n-- ")
		stream, err := tarText(text)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		tars = append(tars, stream)
	}
	return tars
}

// TestReadersAgree reads every case with both readers.
func TestReadersAgree(t *testing.T) {
	for _, stream := range caseTars(t) {
		compareReaders(t, stream)
	}
}

// FuzzHeader looks for streams that the reader takes for something else than archive/tar
// does, and for what makes it panic or hang.
func FuzzHeader(f *testing.F) {
	for _, stream := range caseTars(f) {
		if len(stream) < 8<<10 {
			f.Add(stream)
		}
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		if len(stream) > 1<<16 {
			return
		}
		stream = fixChecksums(stream)
		watched(t, func() { compareReaders(t, stream) })
		var slow, fast []readEntry
		var slowErr, fastErr error
		watched(t, func() {
			bounded(t, func() { slow, slowErr = readOurs(iotest.OneByteReader(bytes.NewReader(stream))) })
			bounded(t, func() { fast, fastErr = readOurs(bytes.NewReader(stream)) })
		})
		if !slices.Equal(slow, fast) || fmt.Sprint(slowErr) != fmt.Sprint(fastErr) {
			t.Fatalf("byte by byte %+v, %v; at once %+v, %v", slow, slowErr, fast, fastErr)
		}
	})
}

// fixChecksums makes each block that has something of a header in it a valid one, so that
// fuzzing gets beyond the checksum.
func fixChecksums(stream []byte) []byte {
	out := bytes.Clone(stream)
	for at := 0; at+blockSize <= len(out); at += blockSize {
		h := (*tarHeader)(out[at:])
		if magic := string(h.bytes(magicField)[:5]); magic == "ustar" {
			copy(out[at:], h.sealed(""))
		}
	}
	return out
}

func TestParseNumber(t *testing.T) {
	for in, want := range map[string]int64{
		"0000644\x00": 0o644, "0000644 ": 0o644, "   644 \x00": 0o644, "        ": 0, "\x00\x00\x00\x00\x00\x00\x00\x00": 0,
		"12\x0034567": 0o12, "77777777": 0o77777777, "\x80\x00\x00\x00\x00\x00\x01\x00": 256, "\xff\xff\xff\xff\xff\xff\xff\xff": -1,
		"\xff\xff\xff\xff\xff\xff\xff\x00": -256, "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff": math.MaxInt64,
		"\xff\xff\xff\xff\x80\x00\x00\x00\x00\x00\x00\x00": math.MinInt64,
	} {
		if got, err := parseNumber([]byte(in)); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"0000648\x00", "-0000644", "0x644\x00\x00\x00", "64 4", "\x80\x00\x00\x00\x80\x00\x00\x00\x00\x00\x00\x00", "\xc0\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "+1"} {
		if got, err := parseNumber([]byte(in)); err == nil {
			t.Errorf("%q: %d", in, got)
		}
	}
}

func TestParseTime(t *testing.T) {
	for in, want := range map[string]tarTime{
		"0": {0, 0}, "1": {1, 0}, "-1": {-1, 0}, "1.5": {1, 5e8}, "-1.5": {-2, 5e8}, "-0.25": {-1, 75e7}, "1.000000001": {1, 1},
		"1.0000000019": {1, 1}, "1.": {1, 0}, "9223372036854775807.9": {math.MaxInt64, 9e8},
	} {
		if got, ok := parseTime(in); !ok || got != want {
			t.Errorf("%s: %v, %v; want %v", in, got, ok, want)
		}
	}
	for _, in := range []string{"", ".", ".5", "x", "1.x", "1.-5", "1e3", "9223372036854775808", "-9223372036854775808.5", "--1"} {
		if got, ok := parseTime(in); ok {
			t.Errorf("%s: %v", in, got)
		}
	}
}

func TestPAXRecords(t *testing.T) {
	for in, want := range map[string]string{
		"12 path=foo\n": "foo", "12 path=foo\n12 path=bar\n": "bar", "12 path=a=b\n\n": "", "13 path=a\nbc\n": "a\nbc",
	} {
		var p paxRecords
		err := p.parse([]byte(in))
		if want == "" {
			if err == nil {
				t.Errorf("%q: %q", in, p.path)
			}
			continue
		}
		if err != nil || string(p.path) != want {
			t.Errorf("%q: %q, %v", in, p.path, err)
		}
	}
	for _, in := range []string{" ", "x", "5", "5 ", "6 a=1\n\n", "-6 a=1\n", "6 a=12", "4 =\n", "6 =12\n", "99999999999999999999 a=1\n", "6\x00a=1\n", "9 a\x00b=1\n\n"} {
		var p paxRecords
		if err := p.parse([]byte(in)); !errors.Is(err, ErrFormat) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func BenchmarkTarReader(b *testing.B) {
	var text strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&text, "file usr/share/doc/package%d/file%d \"some content\" pax.mtime=%d.123456789\n", i/10, i, i)
	}
	stream := mustTar(b, text.String())
	buf := make([]byte, chunkSize)
	b.SetBytes(int64(len(stream)))
	b.ReportAllocs()
	for b.Loop() {
		t := tarReader{src: streamOver(stream, buf)}
		for {
			var e tarEntry
			if err := t.next(&e); err == io.EOF {
				break
			} else if err != nil {
				b.Fatal(err)
			}
		}
	}
}

// streamOver reads from memory through one chunk.
func streamOver(data, buf []byte) stream {
	return stream{ctx: context.Background(), r: bytes.NewReader(data), alloc: func() (*chunk, error) {
		c := &chunk{buf: buf, free: func(*chunk) {}}
		c.refs.Store(1)
		return c, nil
	}}
}
