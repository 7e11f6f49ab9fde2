package overlay2

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// digestLines are lines of each kind, in order.
const digestLines = `dir 0755 0:0 0.000000000 0 - "." -
dir 0755 0:0 1.000000000 0 - "a" -
opaque 0000 0:0 0.000000000 0 - "a/.wh..wh..opq" -
whiteout 0000 0:0 0.000000000 0 - "a/.wh.b" -
file 4755 1:2 -1.500000000 3 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad "a/c d\n\"\xff" ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad
file 0644 1:2 1.500000000 0 - "a.b" e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
char 0600 0:0 1.000000000 1,3 - "n" -
fifo 0600 0:0 1.000000000 0 - "p" -
symlink 0777 0:0 1.000000000 0 - "s" "a b"
link 0644 1:2 1.500000000 0 - "t" "a.b"
`

// sealDigests puts the first and the last line about lines.
func sealDigests(lines string) string {
	all := digestsHead + lines
	return fmt.Sprintf("%s%s%d %x\n", all, digestsEnd, strings.Count(lines, "\n"), sha256.Sum256([]byte(all)))
}

// checkDigests reads digests as Verify does before it compares.
func checkDigests(text string) error {
	r, err := newDigestReader(strings.NewReader(text))
	if err != nil {
		return err
	}
	return r.check(func() error { return nil })
}

// compareLines compares digests with lines.
func compareLines(t testing.TB, text string, lines []string) (found []Difference) {
	t.Helper()
	r, err := newDigestReader(strings.NewReader(text))
	must(t, err)
	c, err := newComparer(r, func(d Difference) { found = append(found, d) })
	must(t, err)
	for _, line := range lines {
		must(t, c.add([]byte(line)))
	}
	must(t, c.end())
	return found
}

// TestDigestOfLink: the xattrs that a link's entry repeats are in the line of the first name alone, where digests have them
// that were recorded before entries of links had any.
func TestDigestOfLink(t *testing.T) {
	h := tar.Header{
		Name: "t", Typeflag: tar.TypeLink, Linkname: "a.b", Mode: 0o644, Uid: 1, Gid: 2, ModTime: time.Unix(1, 5e8),
		PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "x"},
	}
	s := newDigester()
	must(t, s.entry(&h, nil))
	if !strings.HasSuffix(digestLines, "\n"+string(s.line)) {
		t.Errorf("got %s", s.line)
	}
}

// TestDigests: what the writer writes is read, and what it would not write is ErrCorrupt, with a right sum too.
func TestDigests(t *testing.T) {
	must(t, checkDigests(sealDigests(digestLines)))
	var b bytes.Buffer
	w, err := newDigestWriter(&b)
	must(t, err)
	lines := slices.Collect(strings.Lines(digestLines))
	for _, line := range lines {
		must(t, w.add([]byte(line)))
	}
	must(t, w.end())
	if b.String() != sealDigests(digestLines) {
		t.Errorf("wrote %s", b.String())
	}
	for i, line := range lines {
		without := slices.Delete(slices.Clone(lines), i, i+1)
		d, err := parseDigest(line)
		must(t, err)
		if got := compareLines(t, sealDigests(digestLines), without); len(got) != 1 || got[0].String() != d.name+": missing" {
			t.Errorf("without %q: %v", line, got)
		}
		if got := compareLines(t, sealDigests(strings.Join(without, "")), lines); len(got) != 1 || got[0].String() != d.name+": extra" {
			t.Errorf("with %q: %v", line, got)
		}
	}
	for name, bad := range map[string]string{
		"nothing":       "",
		"no root":       lines[1],
		"two roots":     lines[0] + lines[0],
		"root later":    lines[1] + lines[0],
		"twice":         lines[0] + lines[1] + lines[1],
		"order":         lines[0] + lines[5] + lines[4],
		"both":          lines[0] + lines[3] + strings.Replace(lines[5], "a.b", "a/b", 1),
		"opaque root":   lines[0] + strings.Replace(lines[2], "a/", "", 1),
		"end twice":     lines[0] + "end 0 x\n",
		"empty line":    lines[0] + "\n",
		"kind":          lines[0] + strings.Replace(lines[1], "dir", "door", 1),
		"mark as file":  lines[0] + strings.Replace(lines[5], "a.b", ".wh.a", 1),
		"file as mark":  lines[0] + strings.Replace(lines[3], ".wh.b", "b", 1),
		"mode":          lines[0] + strings.Replace(lines[1], "0755", "0855", 1),
		"owner":         lines[0] + strings.Replace(lines[1], "0:0", "0:", 1),
		"time":          lines[0] + strings.Replace(lines[1], "1.000000000", "1", 1),
		"size":          lines[0] + strings.Replace(lines[1], "0000 0 -", "0000 -1 -", 1),
		"xattrs":        lines[0] + strings.Replace(lines[1], "0 - ", "0 + ", 1),
		"content":       lines[0] + strings.Replace(lines[5], "e3b0", "e3b", 1),
		"no content":    lines[0] + strings.Replace(lines[1], `"a" -`, `"a"`, 1),
		"raw quote":     lines[0] + strings.Replace(lines[1], `"a"`, "`a`", 1),
		"odd quote":     lines[0] + strings.Replace(lines[1], `"a"`, `"\x61"`, 1),
		"no name":       lines[0] + strings.Replace(lines[1], `"a"`, `""`, 1),
		"target":        lines[0] + strings.Replace(lines[8], `"a b"`, `"a b`, 1),
		"two blanks":    lines[0] + strings.Replace(lines[1], " ", "  ", 1),
		"carriage":      lines[0] + strings.Replace(lines[1], "\n", "\r\n", 1),
		"other version": "overlay2 digests 2\n",
	} {
		if err := checkDigests(sealDigests(bad)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := checkDigests(strings.Replace(sealDigests(digestLines), "digests 1", "digests 2", 1)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("another version: %v", err)
	}
}

// longReader is digests of n files, made while they are read.
type longReader struct {
	n, i int
	buf  []byte
	sum  bytes.Buffer
	w    *digestWriter
}

func (r *longReader) Read(p []byte) (int, error) {
	for len(r.buf) == 0 {
		if r.i > r.n {
			return 0, io.EOF
		}
		r.sum.Reset()
		if r.i == r.n {
			if err := r.w.end(); err != nil {
				return 0, err
			}
		} else if err := errors.Join(r.w.add([]byte(longLine(r.i))), r.w.w.Flush()); err != nil {
			return 0, err
		}
		r.i++
		r.buf = r.sum.Bytes()
	}
	n := copy(p, r.buf)
	r.buf = r.buf[n:]
	return n, nil
}

func longLine(i int) string {
	if i == 0 {
		return digestLines[:strings.IndexByte(digestLines, '\n')+1]
	}
	return fmt.Sprintf("fifo 0644 0:0 1.000000000 0 - \"some/directory/file%09d\" -\n", i)
}

// TestDigestsMemory: many digests are read, compared and reported in the memory for a few.
func TestDigestsMemory(t *testing.T) {
	const n = 200_000
	open := func() *digestReader {
		long := &longReader{n: n}
		var err error
		long.w, err = newDigestWriter(&long.sum)
		must(t, err)
		r, err := newDigestReader(long)
		must(t, err)
		return r
	}
	peak, start := uint64(0), heapInUse()
	lines := 0
	look := func() error {
		if lines++; lines%20_000 == 0 {
			peak = max(peak, heapInUse())
		}
		return nil
	}
	must(t, open().check(look))
	missing := 0
	c, err := newComparer(open(), func(Difference) { missing++ })
	must(t, err)
	for i := 0; i < n; i += 2 {
		must(t, errors.Join(look(), c.add([]byte(longLine(i)))))
	}
	must(t, c.end())
	if missing != n/2 {
		t.Errorf("%d are missing, not %d", missing, n/2)
	}
	if peak > start+1<<20 {
		t.Errorf("%d bytes of heap, %d before", peak, start)
	}
}

// heapInUse returns the bytes that are reachable.
func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// FuzzDigests: whatever digests hold, they are ErrCorrupt or what the writer writes of the same lines, and compared with their
// own lines they differ in nothing.
func FuzzDigests(f *testing.F) {
	f.Add(sealDigests(digestLines), digestLines)
	f.Add(digestsHead, "")
	f.Add(sealDigests(""), "dir 0755 0:0 0.000000000 0 - \".\" -\n")
	f.Fuzz(func(t *testing.T, text, other string) {
		for _, text := range []string{text, sealDigests(text), sealDigests(other)} {
			err := checkDigests(text)
			if err != nil {
				if !errors.Is(err, ErrCorrupt) {
					t.Fatalf("%v", err)
				}
				continue
			}
			lines := slices.Collect(strings.Lines(text))
			lines = lines[1 : len(lines)-1]
			if sealDigests(strings.Join(lines, "")) != text {
				t.Fatalf("taken, but not as it is written: %q", text)
			}
			if found := compareLines(t, text, lines); found != nil {
				t.Fatalf("with itself: %v", found)
			}
			if found := compareLines(t, text, nil); len(found) != len(lines) {
				t.Fatalf("with nothing: %v", found)
			}
			for i := range lines {
				d, err := parseDigest(lines[i])
				must(t, err)
				found := compareLines(t, text, slices.Delete(slices.Clone(lines), i, i+1))
				if len(found) != 1 || found[0].String() != d.name+": missing" {
					t.Fatalf("without %q: %v", lines[i], found)
				}
			}
		}
	})
}
