package archive

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
	"time"
)

// readBack formats h and reads it with archive/tar.
func readBack(t *testing.T, h *packHeader) (*tar.Header, []byte) {
	t.Helper()
	var w headerWriter
	b := w.append(nil, h)
	if len(b)%blockSize != 0 {
		t.Fatalf("%d bytes are no blocks", len(b))
	}
	b = append(b, bytes.Repeat([]byte("x"), int(h.size))...)
	b = append(b, zeros[:padding(h.size)]...)
	b = append(b, zeros[:2*blockSize]...)
	r := tar.NewReader(bytes.NewReader(b))
	got, err := r.Next()
	if err != nil {
		t.Fatalf("%+v: %v", h, err)
	}
	if n, err := io.Copy(io.Discard, r); err != nil || n != h.size {
		t.Fatalf("%d bytes of content, %v", n, err)
	}
	if _, err := r.Next(); err != io.EOF {
		t.Fatalf("no end: %v", err)
	}
	return got, b
}

// Names of all lengths around the limits, with the slash anywhere, come back.
func TestHeaderNames(t *testing.T) {
	for _, length := range []int{1, 99, 100, 101, 154, 155, 156, 157, 254, 255, 256, 257, 258, 4096} {
		for _, slash := range []int{0, 1, 50, 99, 100, 101, 154, 155, 156, 157, 200, 255, 4000} {
			for _, dir := range []bool{false, true} {
				name := bytes.Repeat([]byte("n"), length)
				if slash > 0 && slash < length-1 {
					name[slash] = '/'
				}
				typ := byte(typeReg)
				if dir {
					name = append(name, '/')
					typ = typeDir
				}
				got, _ := readBack(t, &packHeader{name: name, typ: typ})
				if got.Name != string(name) {
					t.Errorf("length %d, slash at %d: got %d bytes", length, slash, len(got.Name))
				}
				link, _ := readBack(t, &packHeader{name: []byte("l"), typ: typeSymlink, link: name})
				if link.Linkname != string(name) {
					t.Errorf("link of length %d: got %q", length, link.Linkname)
				}
			}
		}
	}
}

// What USTAR can say takes one block.
func TestHeaderPlain(t *testing.T) {
	for _, h := range []packHeader{
		{name: []byte("\xff\xe4 raw bytes"), typ: typeReg, mode: 0o7777, uid: maxOctal7, gid: maxOctal7, mtime: maxOctal11},
		{name: []byte(strings.Repeat("p", 155) + "/" + strings.Repeat("n", 100)), typ: typeReg, size: 1},
		{name: []byte("c"), typ: typeChar, major: 4095, minor: 1<<20 - 1},
		{name: []byte("l"), typ: typeSymlink, link: bytes.Repeat([]byte("l"), 100)},
	} {
		if b := new(headerWriter).append(nil, &h); len(b) != blockSize {
			t.Errorf("%s: %d bytes", h.name, len(b))
		}
		readBack(t, &h)
	}
}

func TestAppendTime(t *testing.T) {
	for _, c := range []struct {
		sec  int64
		nsec uint32
		want string
	}{
		{0, 0, "0"}, {0, 1, "0.000000001"}, {1, 500000000, "1.5"}, {-1, 0, "-1"}, {-1, 500000000, "-0.5"},
		{-2, 750000000, "-1.25"}, {-1, 999999999, "-0.000000001"}, {1 << 40, 120000000, "1099511627776.12"},
		{math.MaxInt64, 999999999, "9223372036854775807.999999999"}, {math.MinInt64, 0, "-9223372036854775808"},
		{math.MinInt64, 1, "-9223372036854775807.999999999"}, {math.MinInt64 + 1, 0, "-9223372036854775807"},
	} {
		if got := string(appendTime(nil, c.sec, c.nsec)); got != c.want {
			t.Errorf("%d %d: %s, want %s", c.sec, c.nsec, got, c.want)
		}
		if back, ok := parseTime(c.want); !ok || back != (tarTime{c.sec, int64(c.nsec)}) {
			t.Errorf("%s: back %v, %v", c.want, back, ok)
		}
	}
}

// A map of fragments that archive/tar, and so Docker, would not read is none.
func TestFormatFragments(t *testing.T) {
	fragments := make([]dataFragment, sparseMost)
	for i := range fragments {
		fragments[i] = dataFragment{offset: 1e13 + int64(i)<<20, length: 1}
	}
	for _, n := range []int{1, 1000, 61680, 61681, sparseMost} {
		text, data := formatFragments(fragments[:n])
		if fits := n <= 61680; (text != nil) != fits {
			t.Errorf("%d fragments: %d bytes", n, len(text))
		} else if !fits {
			continue
		}
		h := packHeader{name: []byte("f"), typ: typeReg, sparse: true, realSize: 1e15, size: int64(len(text)) + data}
		stream := append(new(headerWriter).append(nil, &h), text...)
		if got, err := tar.NewReader(bytes.NewReader(stream)).Next(); err != nil || got.Size != 1e15 || data != int64(n) {
			t.Errorf("%d fragments of %d bytes: %v", n, data, err)
		}
	}
}

// Names of xattrs come back whatever they hold; what needs no escape has none, as readers but GNU's and ours know none.
func TestEscapeKey(t *testing.T) {
	for name, want := range map[string]string{
		"user.a": "user.a", "user.a%b": "user.a%b", "user.a%25b": "user.a%25b", "user.a%2525": "user.a%2525",
		"user.a=b": "user.a%3Db", "user.%=": "user.%25%3D", "user.a%3Db": "user.a%253Db", "user.a%253Db": "user.a%25253Db",
		"user.%25%253D": "user.%2525%25253D", "user.%%3D": "user.%25%253D", "user.%25": "user.%25", "user.a%": "user.a%", "user.%3d": "user.%3d",
	} {
		if got := escapeKey(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
		if got := unescapeKey(want); got != name {
			t.Errorf("%s: back %s", name, got)
		}
	}
	// All names of up to six parts.
	var all func(name string, parts int)
	all = func(name string, parts int) {
		if back := unescapeKey(escapeKey(name)); back != name {
			t.Errorf("%s: %s, back %s", name, escapeKey(name), back)
		}
		for _, part := range []string{"%", "25", "3D", "=", "x"} {
			if parts > 0 {
				all(name+part, parts-1)
			}
		}
	}
	all("", 6)
}

// FuzzHeaderWriter holds what is written against what archive/tar reads.
func FuzzHeaderWriter(f *testing.F) {
	f.Add("a/b", "c", uint32(0o4755), uint32(0), uint32(1<<31), int64(3), int64(-1), uint32(5), "user.x", "v", byte(0))
	f.Add(strings.Repeat("a/", 200), strings.Repeat("l", 101), uint32(0), uint32(1<<21), uint32(7), int64(0), int64(1<<34), uint32(0), "user.a=b", "\x00", byte(5))
	f.Add("\xff", "\xfe", uint32(0), uint32(0), uint32(0), int64(1000), int64(1), uint32(999999999), "", "", byte(2))
	f.Fuzz(func(t *testing.T, name, link string, mode, uid, gid uint32, size, mtime int64, nsec uint32, key, value string, kind byte) {
		const types = "0123456"
		h := packHeader{
			name: []byte(name), typ: types[int(kind)%len(types)], mode: mode & 0o7777, uid: uid, gid: gid,
			mtime: mtime % (1 << 40), mtimeNsec: nsec % 1e9,
		}
		if name == "" || strings.Contains(name+link+key, "\x00") || strings.HasSuffix(name, "/") {
			return
		}
		switch h.typ {
		case typeReg:
			h.size = min(max(size, 0), 5000)
		case typeLink, typeSymlink:
			if link == "" {
				return
			}
			h.link = []byte(link)
		case typeChar, typeBlock:
			h.major, h.minor = uid%4096, gid%(1<<20)
		case typeDir:
			h.name = append(h.name, '/')
		}
		if key != "" {
			h.xattrs = []tarXattr{{key, value}}
		}
		got, b := readBack(t, &h)
		want := fmt.Sprint(string(h.name), string(h.link), h.mode, h.uid, h.gid, h.size, time.Unix(h.mtime, int64(h.mtimeNsec)).UnixNano(), h.major, h.minor)
		back := fmt.Sprint(got.Name, got.Linkname, got.Mode, got.Uid, got.Gid, got.Size, got.ModTime.UnixNano(), got.Devmajor, got.Devminor)
		if back != want {
			t.Errorf("got %s, want %s", back, want)
		}
		if key != "" && got.PAXRecords["SCHILY.xattr."+escapeKey(key)] != value {
			t.Errorf("xattr %q: %q", key, got.PAXRecords)
		}
		if again := new(headerWriter).append(nil, &h); !bytes.HasPrefix(b, again) {
			t.Error("not the same bytes again")
		}
	})
}
