package archive

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// allKinds are entries of all kinds, each with all headers that belong to it, in a stream without end.
func allKinds(t *testing.T) [][]byte {
	t.Helper()
	long := "long/" + strings.Repeat("n", 120)
	oldMap := `00000000000\x0000000000003\x00` + `00000000020\x0000000000003\x00` +
		strings.Repeat(`\x00`, 48) + `\x01` + `00000000144\x00`
	oldMore := `00000000100\x0000000000002\x00` + strings.Repeat(`\x00`, 512-24)
	newMap := `2\n0\n3\n97\n3\n` + strings.Repeat(`\x00`, 512-11)
	var kinds [][]byte
	for _, line := range []string{
		"global pax.comment=all",
		"dir ./ 0750 uid=3",
		"dir d 02755 uid=1 pax.mtime=1.5",
		"file " + long + " \"" + strings.Repeat("x", 700) + "\" pax.mtime=-1.25 pax.uid=5000000 user.a=\"1\"",
		"file gnu fmt=gnu gnuname=gnu/" + strings.Repeat("m", 120) + " \"body\"",
		"symlink s fmt=gnu -> " + strings.Repeat("t/", 60),
		`sparse old fmt=gnu size=8 "` + oldMore + `abcdefgh" map="` + oldMap + `"`,
		`file GNUSparseFile.1/a "` + newMap + `abcdef" pax.GNU.sparse.major=1 pax.GNU.sparse.minor=0 pax.GNU.sparse.realsize=100 pax.GNU.sparse.name=new`,
		"link d/l -> " + long,
		"link s2 -> s",
		"char c 1:3",
		"fifo p 0600",
		"file low/sub/f \"x\"", // its parents are the lower layer's
		"file .wh.gone \"\"",
		"file low/.wh..wh..opq \"\"",
	} {
		kinds = append(kinds, mustTar(t, line+"\nnoend"))
	}
	return kinds
}

// TestUnpackEveryOffset has the stream break off behind each of its bytes, by an error and by its end, in pieces
// as large as may be and byte by byte: what the reader said comes out, and nothing stays open or at work.
func TestUnpackEveryOffset(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	top := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"}) // another one where that has no user.* xattrs
	overlaytest.NoLeaks(t)
	lower, upper := filepath.Join(top, "lower"), filepath.Join(top, "upper")
	overlaytest.Build(t, lower, "dir low 0700 uid=7\ndir low/sub 0711\nfile low/old \"1\"\nfile gone \"2\"")
	var stream []byte
	whole := map[int]bool{0: true} // offsets at which the end is one
	for _, entry := range allKinds(t) {
		stream = append(stream, entry...)
		whole[len(stream)] = true
	}
	stream = append(stream, make([]byte, 2*blockSize)...)
	whole[len(stream)-blockSize], whole[len(stream)] = true, true

	open, goroutines := descriptors(t), runtime.NumGoroutine()
	unpack := func(r io.Reader) error {
		if err := os.Mkdir(upper, 0o755); err != nil {
			t.Fatal(err)
		}
		_, err := Unpack(context.Background(), upper, r, UnpackOptions{Lowers: []string{lower}})
		if err := os.RemoveAll(upper); err != nil {
			t.Fatal(err)
		}
		return err
	}
	if err := unpack(bytes.NewReader(stream)); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("the reader broke")
	breakOff := func(way brokenWay, at int) {
		if err := unpack(way(stream[:at], broken)); !errors.Is(err, broken) {
			t.Errorf("error at %d of %d: %v", at, len(stream), err)
		}
	}
	end := func(way brokenWay, at int) {
		err := unpack(way(stream[:at], io.EOF))
		if whole[at] && err != nil {
			t.Errorf("end at %d of %d: %v", at, len(stream), err)
		}
		if !whole[at] && (!errors.Is(err, ErrFormat) || !errors.Is(err, io.ErrUnexpectedEOF)) {
			t.Errorf("cut at %d of %d: %v", at, len(stream), err)
		}
	}
	for at := 0; at <= len(stream) && !t.Failed(); at++ {
		// About the edges of blocks each in each way; elsewhere in one, by turns.
		if edge := (at + 1) % blockSize; edge > 2 {
			if testing.Short() && at%23 != 0 { // odd, for both kinds of turn
				continue
			}
			one := []func(brokenWay, int){breakOff, end}[at%2]
			one(brokenWays[at/2%len(brokenWays)], at)
			continue
		}
		for _, way := range brokenWays {
			breakOff(way, at)
			end(way, at)
		}
		if n := descriptors(t); n > open {
			t.Errorf("%d descriptors at %d, before it %d", n, at, open)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > goroutines; {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, before it %d", runtime.NumGoroutine(), goroutines)
		}
		time.Sleep(time.Millisecond)
	}
}

// brokenWay is a reader that gives some bytes and then an error.
type brokenWay func(b []byte, err error) io.Reader

// brokenWays give the error behind or with the last of the bytes, and these at once or byte by byte.
var brokenWays = []brokenWay{
	func(b []byte, err error) io.Reader { return io.MultiReader(bytes.NewReader(b), iotest.ErrReader(err)) },
	func(b []byte, err error) io.Reader { return &lastReader{data: b, err: err} },
	func(b []byte, err error) io.Reader { return iotest.OneByteReader(&lastReader{data: b, err: err}) },
	func(b []byte, err error) io.Reader {
		return iotest.OneByteReader(io.MultiReader(bytes.NewReader(b), iotest.ErrReader(err)))
	},
}

// descriptors returns how many descriptors the process has open.
func descriptors(t *testing.T) int {
	t.Helper()
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	names, err := dir.Readdirnames(-1)
	if err = errors.Join(err, dir.Close()); err != nil {
		t.Fatal(err)
	}
	return len(names)
}
