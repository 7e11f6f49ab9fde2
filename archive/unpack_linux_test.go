package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

func mustUnpack(t testing.TB, dir string, stream []byte, opts UnpackOptions) Stats {
	t.Helper()
	stats, err := Unpack(context.Background(), dir, bytes.NewReader(stream), opts)
	if err != nil {
		t.Fatal(err)
	}
	return stats
}

// mixed is a stream of everything, with bodies of many sizes.
func mixed(t testing.TB, files int) []byte {
	t.Helper()
	var b strings.Builder
	b.WriteString("dir ./ 0755\ndir d 02755 uid=1\nsymlink s -> d\nfifo p\nchar c 1:3\n")
	for i := range files {
		fmt.Fprintf(&b, "file d/sub%d/f%d \"%s\" uid=%d mtime=%d\n", i%7, i, strings.Repeat("x", i*i%5000), i%3, i)
	}
	b.WriteString("link l -> d/sub0/f0\nfile s/through \"y\" user.a=\"b\"\nfile long/" + strings.Repeat("n", 200) + " \"z\"\n")
	return mustTar(t, b.String())
}

func TestUnpackTimes(t *testing.T) {
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		lower, upper := filepath.Join(dir, "lower"), filepath.Join(dir, "upper")
		overlaytest.Build(t, lower, "dir low 0700 mtime=5.000000006\ndir low/sub mtime=7.000000008\nfile low/sub/f \"x\"\nfile low/g \"y\"\ndir gone")
		overlaytest.Build(t, upper, "dir before mtime=11.000000012\ndir . mtime=13.5")
		stats := mustUnpack(t, upper, mustTar(t, `
dir a pax.mtime=1.25
dir b pax.mtime=2.25
file a/f "x" pax.mtime=-3.75
file b/f "x" mtime=0
file a/g "x" pax.mtime=4.123456789
symlink a/s -> x pax.mtime=5.5
char a/c 1:3 pax.mtime=6.5
fifo a/p pax.mtime=7.5
dir a/deep pax.mtime=8.5
file a/deep/er/f "x" mtime=9
file low/sub/new "x" mtime=10
link low/l -> low/sub/f
file before/new "x" mtime=10
file .wh.gone ""
file a/h "back again" mtime=14
`), UnpackOptions{Lowers: []string{lower}})
		if stats.Entries != 15 {
			t.Errorf("%d entries", stats.Entries)
		}
		for name, want := range map[string]string{
			".": "13.500000000", "a": "1.250000000", "b": "2.250000000", "a/f": "-4.250000000", "b/f": "0.000000000",
			"a/g": "4.123456789", "a/s": "5.500000000", "a/c": "6.500000000", "a/p": "7.500000000", "a/deep": "8.500000000",
			"a/deep/er/f": "9.000000000", "low": "5.000000006", "low/sub": "7.000000008", "low/sub/new": "10.000000000",
			"low/sub/f": "1000000000.000000000", "before": "11.000000012", "gone": "0.000000000",
		} {
			var st unix.Stat_t
			if err := unix.Lstat(filepath.Join(upper, name), &st); err != nil {
				t.Error(err)
			} else if got := fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec); got != want {
				t.Errorf("%s: mtime %s, want %s", name, got, want)
			}
		}
	})
}

// TestUnpackTimesBeyond: a time that the filesystem cannot hold is no error; the kernel sets another.
func TestUnpackTimesBeyond(t *testing.T) {
	const late = int64(1e12) // the year 33658
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		mustUnpack(t, dir, mustTar(t, fmt.Sprintf("file a \"x\" mtime=%d\n", late)), UnpackOptions{})
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(dir, "a"), &st))
		if sec, _ := st.Mtim.Unix(); sec > late {
			t.Errorf("mtime %d", sec)
		}
	})
}

// TestUnpackReaders gives the stream in all the ways an io.Reader may.
func TestUnpackReaders(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	stream := mixed(t, 60)
	want := t.TempDir()
	mustUnpack(t, want, stream, UnpackOptions{})
	for name, wrap := range map[string]func(io.Reader) io.Reader{
		"one byte":        iotest.OneByteReader,
		"half":            iotest.HalfReader,
		"data with EOF":   iotest.DataErrReader,
		"sometimes none":  func(r io.Reader) io.Reader { return &lazyReader{r: r} },
		"odd pieces":      func(r io.Reader) io.Reader { return &oddReader{r: r} },
		"WriterTo hidden": func(r io.Reader) io.Reader { return struct{ io.Reader }{r} },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			stats, err := Unpack(context.Background(), dir, wrap(bytes.NewReader(stream)), UnpackOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if stats.TarBytes != int64(len(stream)) {
				t.Errorf("TarBytes is %d of %d", stats.TarBytes, len(stream))
			}
			no := overlaytest.NoRootTime | overlaytest.NoDirTimes
			overlaytest.Compare(t, overlaytest.Tree(t, want, no), overlaytest.Tree(t, dir, no))
		})
	}
}

// lazyReader gives nothing at every other call.
type lazyReader struct {
	r    io.Reader
	lazy bool
}

func (l *lazyReader) Read(p []byte) (int, error) {
	if l.lazy = !l.lazy; l.lazy {
		return 0, nil
	}
	return l.r.Read(p)
}

// oddReader gives pieces of odd sizes.
type oddReader struct {
	r io.Reader
	n int
}

func (o *oddReader) Read(p []byte) (int, error) {
	o.n = (o.n*7 + 3) % 1021
	return o.r.Read(p[:min(len(p), o.n+1)])
}

// TestUnpackReadErrors lets the reader fail at each offset: the error comes out as it is.
func TestUnpackReadErrors(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	stream := mixed(t, 3)
	broken := errors.New("the reader broke")
	for at := 0; at <= len(stream); at += 97 {
		r := io.MultiReader(bytes.NewReader(stream[:at]), iotest.ErrReader(broken))
		if _, err := Unpack(context.Background(), t.TempDir(), r, UnpackOptions{}); !errors.Is(err, broken) {
			t.Fatalf("failing at %d: %v", at, err)
		}
		// With the last bytes, too.
		r = &lastReader{data: stream[:at], err: broken}
		if _, err := Unpack(context.Background(), t.TempDir(), r, UnpackOptions{}); !errors.Is(err, broken) {
			t.Fatalf("failing with the bytes up to %d: %v", at, err)
		}
	}
}

// lastReader returns err together with the last of its bytes.
type lastReader struct {
	data []byte
	err  error
}

func (l *lastReader) Read(p []byte) (int, error) {
	n := copy(p, l.data)
	if l.data = l.data[n:]; len(l.data) == 0 {
		return n, l.err
	}
	return n, nil
}

// TestUnpackTruncated cuts the stream everywhere: only the end of an entry is an end, and
// nothing waits for what does not come (CVE-2021-20291).
func TestUnpackTruncated(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	stream := mustTar(t, "dir a\nfile a/b \"hello\"\nfile a/c \"x\" user.a=\"1\"\nfile a/d \""+strings.Repeat("y", 1000)+"\"\nnoend")
	whole := map[int]bool{0: true, 512: true, 512 + 1024: true, 512 + 1024 + 2048: true, len(stream): true}
	for at := 0; at <= len(stream); at += 64 {
		_, err := Unpack(context.Background(), t.TempDir(), bytes.NewReader(stream[:at]), UnpackOptions{})
		if whole[at] {
			if err != nil {
				t.Errorf("cut at %d: %v", at, err)
			}
			continue
		}
		if !errors.Is(err, ErrFormat) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut at %d: %v", at, err)
		}
	}
}

// TestUnpackCompressed: who forgets to decompress is told so, however short the stream is; what only looks so is a tar.
func TestUnpackCompressed(t *testing.T) {
	overlaytest.Require(t, "root")
	for name, magic := range map[string]string{"gzip": "\x1f\x8b\x08", "zstd": "\x28\xb5\x2f\xfd", "xz": "\xfd7zXZ\x00", "bzip2": "BZh9"} {
		for _, size := range []int{len(magic), 100, blockSize, 3 * blockSize} {
			stream := make([]byte, size)
			copy(stream, magic)
			_, err := Unpack(context.Background(), t.TempDir(), bytes.NewReader(stream), UnpackOptions{})
			if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "compressed with "+name) {
				t.Errorf("%s, %d bytes: %v", name, size, err)
			}
		}
	}
	_, err := Unpack(context.Background(), t.TempDir(), strings.NewReader("BZ"), UnpackOptions{})
	if !errors.Is(err, ErrFormat) || !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "in the header at byte 0") {
		t.Errorf("two bytes: %v", err)
	}
	stream := mustTar(t, "file BZh9 \"x\"")
	if _, err := Unpack(context.Background(), t.TempDir(), bytes.NewReader(stream), UnpackOptions{}); err != nil {
		t.Error(err)
	}
}

func TestUnpackReaderMisbehaves(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	for name, r := range map[string]io.Reader{
		"always empty": readerFunc(func([]byte) (int, error) { return 0, nil }),
		"too much":     readerFunc(func(p []byte) (int, error) { return len(p) + 1, nil }),
		"negative":     readerFunc(func([]byte) (int, error) { return -1, nil }),
	} {
		if _, err := Unpack(context.Background(), t.TempDir(), r, UnpackOptions{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// endless is a tar of files of size bytes each that never ends.
func endless(t testing.TB, size int64) io.Reader {
	var left, n int64
	var header []byte
	return readerFunc(func(p []byte) (int, error) {
		if len(header) == 0 && left == 0 {
			n++
			var buf bytes.Buffer
			w := tar.NewWriter(&buf)
			if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("d%d/f%d", n%1000, n), Typeflag: tar.TypeReg, Size: size, Mode: 0o644}); err != nil {
				t.Error(err)
			}
			header, left = buf.Bytes(), (size+511)&^511
		}
		if len(header) > 0 {
			c := copy(p, header)
			header = header[c:]
			return c, nil
		}
		c := int(min(int64(len(p)), left))
		clear(p[:c])
		left -= int64(c)
		return c, nil
	})
}

// TestUnpackCancel cancels in the midst of small files, and of a big one: Unpack is back
// within 100 ms.
func TestUnpackCancel(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	for _, size := range []int64{100, 1 << 40} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs", Size: 2 << 30})
			overlaytest.NoLeaks(t)
			best := time.Hour
			for range 3 { // a machine that does much else may take longer
				ctx, cancel := context.WithCancel(context.Background())
				var at atomic.Pointer[time.Time]
				time.AfterFunc(50*time.Millisecond, func() { now := time.Now(); at.Store(&now); cancel() })
				_, err := Unpack(ctx, dir, endless(t, size), UnpackOptions{})
				best = min(best, time.Since(*at.Load()))
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			}
			if best > 100*time.Millisecond {
				t.Errorf("came back after %v", best)
			}
		})
	}
	t.Run("before", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := Unpack(ctx, t.TempDir(), bytes.NewReader(mixed(t, 1)), UnpackOptions{}); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// TestUnpackCancelRemoval cancels while a large tree is being replaced, and has the stream fail then: neither
// waits until all of the tree is gone.
func TestUnpackCancelRemoval(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	const files = 100_000
	mine := errors.New("mine")
	for _, c := range []struct {
		name  string
		entry string
		fail  bool
	}{{"replaced", "big", false}, {"whiteout", ".wh.big", false}, {"opaque", ".wh..wh..opq", false}, {"stream error", "big", true}} {
		t.Run(c.name, func(t *testing.T) {
			overlaytest.NoLeaks(t)
			dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs", Size: 1 << 30})
			if err := os.Mkdir(filepath.Join(dir, "big"), 0o755); err != nil {
				t.Fatal(err)
			}
			for i := range files {
				if err := unix.Mknod(filepath.Join(dir, "big", fmt.Sprint(i)), unix.S_IFREG|0o644, 0); err != nil {
					t.Fatal(err)
				}
			}
			before, err := os.Stat(filepath.Join(dir, "big"))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancelCause(context.Background())
			defer cancel(nil)
			// Entries are handed on in batches.
			tar := tarOf(t, append([]string{c.entry}, overlaytest.Names(2*maxBatch)...)...)
			end := readerFunc(func([]byte) (int, error) {
				// The builder has begun by the time that a file is missing.
				for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
					// The size of a directory of tmpfs counts its names.
					if st, err := os.Stat(filepath.Join(dir, "big")); err != nil || st.Size() < before.Size() {
						break
					}
				}
				if c.fail {
					return 0, mine
				}
				cancel(nil)
				return 0, io.EOF
			})
			_, err = Unpack(ctx, dir, io.MultiReader(bytes.NewReader(tar), end), UnpackOptions{Format: Merged})
			want := context.Canceled
			if c.fail {
				want = mine
			}
			if !errors.Is(err, want) {
				t.Errorf("error %v, want %v", err, want)
			}
			if left, err := os.ReadDir(filepath.Join(dir, "big")); err != nil || len(left) == 0 {
				t.Errorf("the tree is gone: %v", err)
			}
		})
	}
}

// tarOf is a tar of empty files that has no end yet.
func tarOf(t testing.TB, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range names {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// TestUnpackNoSpace fills a small filesystem: ENOSPC comes out with the entry, and the
// reader is not read to its end, which it doesn't have.
func TestUnpackNoSpace(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	for _, size := range []int64{100, 5000, 1 << 40} {
		dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs", Size: 4 << 20})
		overlaytest.NoLeaks(t)
		r := endless(t, size)
		_, err := Unpack(context.Background(), dir, r, UnpackOptions{})
		var entry *EntryError
		if !errors.Is(err, unix.ENOSPC) || !errors.As(err, &entry) || entry.Op != "unpack" || entry.Name == "" {
			t.Errorf("files of %d bytes: %v", size, err)
		}
	}
}

// TestUnpackMemory unpacks much, in both ways, and looks at the heap on the way.
func TestUnpackMemory(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	const limit = 100 << 20
	for name, c := range map[string]struct{ size, total int64 }{
		"one big file": {1 << 40, 1 << 30},
		"many files":   {10, 30 << 20},
		"no bodies":    {0, 15 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs", Size: 3 << 30, Options: "nr_inodes=0"})
			r := endless(t, c.size)
			enough := errors.New("enough")
			var peak uint64
			var read int64
			_, err := Unpack(context.Background(), dir, readerFunc(func(p []byte) (int, error) {
				if read > c.total {
					return 0, enough
				}
				n, err := r.Read(p)
				if before := read >> 23; (read+int64(n))>>23 != before {
					var m runtime.MemStats
					runtime.ReadMemStats(&m)
					peak = max(peak, m.HeapAlloc)
				}
				read += int64(n)
				return n, err
			}), UnpackOptions{})
			if !errors.Is(err, enough) {
				t.Fatal(err)
			}
			t.Logf("heap up to %d MiB", peak>>20)
			if peak > limit {
				t.Errorf("heap of %d MiB", peak>>20)
			}
		})
	}
}

// TestUnpackDeep makes 2,000 nested directories from a stream of one short entry each, and
// comes back on the way: in linear time, with few descriptors, and with the right times.
func TestUnpackDeep(t *testing.T) {
	overlaytest.Require(t, "root")
	const depth = 2000
	var text strings.Builder
	for i := range depth {
		fmt.Fprintf(&text, "dir %s mtime=%d\n", strings.Repeat("d/", i+1), i+1)
	}
	// From the deepest to the top, and into the middle from there.
	for i := depth; i > 0; i -= 100 {
		fmt.Fprintf(&text, "file %sf%d \"x\"\nfile top%d \"x\"\n", strings.Repeat("d/", i), i, i)
	}
	stream := mustTar(t, text.String())
	for _, merging := range []bool{false, true} {
		t.Run(fmt.Sprint("merging=", merging), func(t *testing.T) {
			dir := t.TempDir()
			overlaytest.NoLeaks(t)
			var opts UnpackOptions
			if merging {
				lower := filepath.Join(dir, "lower")
				if err := os.Mkdir(lower, 0o755); err != nil {
					t.Fatal(err)
				}
				mustUnpack(t, lower, stream, UnpackOptions{})
				opts.Lowers = []string{lower}
				marks := mustTar(t, "file "+strings.Repeat("d/", depth)+".wh.f2000 \"\"\nfile "+strings.Repeat("d/", 1900)+".wh.f1900 \"\"\nfile "+strings.Repeat("d/", 100)+".wh.f100 \"\"")
				upper := filepath.Join(dir, "upper2")
				if err := os.Mkdir(upper, 0o755); err != nil {
					t.Fatal(err)
				}
				mustUnpack(t, upper, marks, opts)
				if n := strings.Count(overlaytest.Tree(t, upper), " char 0000 "); n != 3 {
					t.Errorf("%d whiteouts", n)
				}
			}
			upper := filepath.Join(dir, "upper")
			if err := os.Mkdir(upper, 0o755); err != nil {
				t.Fatal(err)
			}
			var most int
			opts.Progress = func(Stats) {
				fds, err := os.ReadDir("/proc/self/fd")
				if err != nil {
					t.Error(err)
				}
				most = max(most, len(fds))
			}
			start := time.Now()
			mustUnpack(t, upper, stream, opts)
			t.Logf("%v, %d descriptors", time.Since(start), most)
			if most > 400 {
				t.Errorf("%d descriptors", most)
			}
			lines := strings.Split(overlaytest.Tree(t, upper), "\n")
			dirs := 0
			for _, line := range lines {
				if name, rest, found := strings.Cut(line, "\" dir "); found && strings.HasPrefix(name, "\"d") {
					dirs++
					if want := fmt.Sprintf("mtime=%d.0", strings.Count(name, "d")); !strings.Contains(rest, want) {
						t.Fatalf("want %s: %s", want, rest)
					}
				}
			}
			if dirs != depth {
				t.Errorf("%d directories", dirs)
			}
		})
	}
}

// TestUnpackDeepManyLowers: 100 layers that merge 30 directories deep need some hundred descriptors, not one for each.
func TestUnpackDeepManyLowers(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	const depth = 30
	var tree, down, up strings.Builder
	for i := range depth {
		dir := strings.Repeat("d/", i+1)
		fmt.Fprintf(&tree, "file %sa \"x\"\nfile %sb \"x\"\nfile %sc \"x\"\n", dir, dir, dir)
		fmt.Fprintf(&down, "file %s.wh.a\n", dir)
		dir = strings.Repeat("d/", depth-i)
		fmt.Fprintf(&up, "file %s.wh.b\nlink %scopied -> %sc\n", dir, dir, dir)
	}
	var lowers []string
	for i := range 100 {
		lowers = append(lowers, filepath.Join(base, strconv.Itoa(i)))
		overlaytest.Build(t, lowers[i], tree.String())
	}
	dir := filepath.Join(base, "upper")
	must(t, os.Mkdir(dir, 0o755))
	stream := mustTar(t, down.String()+up.String())
	var was unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 600, Max: was.Max}))
	defer func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was)) }()
	start := time.Now()
	mustUnpack(t, dir, stream, UnpackOptions{Lowers: lowers})
	t.Log(time.Since(start))
	got := overlaytest.Tree(t, dir)
	if marks, files := strings.Count(got, " char 0000 "), strings.Count(got, `/c" file `); marks != 2*depth || files != depth {
		t.Errorf("%d whiteouts and %d copied files:\n%s", marks, files, got)
	}
}

// TestUnpackManyNames puts 50,000 entries into one directory.
func TestUnpackManyNames(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	if testing.Short() {
		return
	}
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs", Options: "nr_inodes=0"})
	const count = 50000
	pr, pw := io.Pipe()
	go func() {
		var err error
		for i := 0; i < count && err == nil; i++ {
			w := tarTextWriter{}
			w.write(&textEntry{name: fmt.Sprintf("d/%d", i), typ: '0', mode: 0o644})
			_, err = pw.Write(w.out)
		}
		pw.CloseWithError(err)
	}()
	stats, err := Unpack(context.Background(), dir, pr, UnpackOptions{})
	if err != nil || stats.Entries != count {
		t.Fatal(stats, err)
	}
	names, err := os.ReadDir(filepath.Join(dir, "d"))
	if err != nil || len(names) != count {
		t.Error(len(names), err)
	}
}

// TestUnpackSparse keeps holes as holes, also where they are larger than the disk.
func TestUnpackSparse(t *testing.T) {
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		const size = 64 << 20
		stream := mustTar(t, fmt.Sprintf("file GNUSparseFile.0/a %q pax.GNU.sparse.name=a pax.GNU.sparse.size=%d pax.GNU.sparse.map=1048576,5,%d,0\nfile b pax.GNU.sparse.size=%d pax.GNU.sparse.map=0,0",
			"hello", size, size, int64(1)<<40))
		stats := mustUnpack(t, dir, stream, UnpackOptions{})
		if stats.Size != size+1<<40 {
			t.Error(stats.Size)
		}
		for name, want := range map[string]int64{"a": size, "b": 1 << 40} {
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(dir, name), &st); err != nil {
				t.Fatal(err)
			}
			if st.Size != want || st.Blocks*512 > 1<<20 {
				t.Errorf("%s: %d bytes in %d blocks", name, st.Size, st.Blocks)
			}
		}
		data, err := os.ReadFile(filepath.Join(dir, "a"))
		if err != nil || string(data[1<<20:1<<20+6]) != "hello\x00" {
			t.Error(err, data[1<<20:1<<20+6])
		}
		// 8 EiB of nothing: a hole or an error, at once.
		huge := mustTar(t, "file c pax.GNU.sparse.size=9223372036854775807 pax.GNU.sparse.map=0,0")
		start := time.Now()
		if _, err := Unpack(context.Background(), dir, bytes.NewReader(huge), UnpackOptions{}); err != nil && !errors.Is(err, unix.EFBIG) {
			t.Error(err)
		}
		if time.Since(start) > 5*time.Second {
			t.Error("took", time.Since(start))
		}
	})
}

// TestUnpackFirstError: of several failing entries, the first in the stream is told, though
// names and contents are done by different goroutines.
func TestUnpackFirstError(t *testing.T) {
	overlaytest.Require(t, "root")
	var b strings.Builder
	for i := range 40 {
		fmt.Fprintf(&b, "file ok%d \"x\"\n", i)
	}
	b.WriteString("file content \"x\" foo.bar=\"no such namespace\"\n")
	for i := range 3 {
		fmt.Fprintf(&b, "file more%d \"x\"\n", i)
	}
	b.WriteString("file ok1/name \"a file as parent\"\nfile third \"x\" foo.bar=\"x\"\nbytes garbage\n")
	stream := mustTar(t, b.String())
	for range 30 {
		_, err := Unpack(context.Background(), t.TempDir(), bytes.NewReader(stream), UnpackOptions{})
		var entry *EntryError
		if !errors.As(err, &entry) || entry.Name != "content" || !errors.Is(err, unix.EOPNOTSUPP) {
			t.Fatal(err)
		}
	}
}

// TestUnpackReaderGoroutine: the caller's reader runs on the caller's goroutine only.
func TestUnpackReaderGoroutine(t *testing.T) {
	overlaytest.Require(t, "root")
	id := func() string {
		buf := make([]byte, 64)
		return strings.Fields(string(buf[:runtime.Stack(buf, false)]))[1]
	}
	stream, want := bytes.NewReader(mixed(t, 20)), id()
	var progress int
	_, err := Unpack(context.Background(), t.TempDir(), readerFunc(func(p []byte) (int, error) {
		if id() != want {
			t.Error("another goroutine reads")
		}
		return stream.Read(p[:min(len(p), 700)])
	}), UnpackOptions{Progress: func(Stats) {
		progress++
		if id() != want {
			t.Error("another goroutine tells the progress")
		}
	}})
	if err != nil || progress == 0 {
		t.Error(err, progress)
	}
}

// TestUnpackReaderPanics: a reader that panics, where somebody above recovers, leaves nothing open and nothing running.
func TestUnpackReaderPanics(t *testing.T) {
	overlaytest.Require(t, "root")
	stream := mixed(t, 60)
	for name, f := range map[string]func(){
		"panic":  func() { panic("reader") },
		"Goexit": runtime.Goexit,
	} {
		t.Run(name, func(t *testing.T) {
			overlaytest.NoLeaks(t)
			dir := t.TempDir()
			ended := make(chan any)
			go func() {
				defer func() { ended <- recover() }()
				r := io.MultiReader(bytes.NewReader(stream[:len(stream)/2]), readerFunc(func([]byte) (int, error) {
					f()
					return 0, io.EOF
				}))
				_, _ = Unpack(context.Background(), dir, r, UnpackOptions{})
			}()
			if got := <-ended; (got != nil) != (name == "panic") {
				t.Errorf("recovered %v", got)
			}
		})
	}
}

// TestUnpackSymlinkRace swaps a directory and a symlink that points out while a stream goes
// through it (CVE-2018-15664, CVE-2026-17106): whatever comes of it, nothing outside changes.
func TestUnpackSymlinkRace(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	top := t.TempDir()
	root, outside := filepath.Join(top, "root"), filepath.Join(top, "outside")
	overlaytest.Build(t, top, "dir root/d\ndir root/d/sub\nsymlink root/evil -> ../outside\ndir outside 0700 mtime=77\nfile outside/f \"keep\"\ndir outside/sub mtime=78\nfile outside/sub/f \"keep\"")
	want := overlaytest.Tree(t, outside)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				if err := unix.Renameat2(unix.AT_FDCWD, filepath.Join(root, "d"), unix.AT_FDCWD, filepath.Join(root, "evil"), unix.RENAME_EXCHANGE); err != nil && !errors.Is(err, unix.ENOENT) {
					t.Error(err)
					return
				}
			}
		}
	}()
	stream := mustTar(t, `
file d/f "evil" 04777
file d/sub/f "evil"
file x "1"
dir d/sub 0777 uid=7
link d/l -> d/f
file .wh.x ""
symlink d/s -> evil
char d/c 0666 1:3
file d/sub/.wh..wh..opq ""
`)
	deadline := time.Now().Add(2 * time.Second)
	for time.Now().Before(deadline) {
		for _, opts := range []UnpackOptions{{}, {Format: Merged}} {
			_, _ = Unpack(context.Background(), root, bytes.NewReader(stream), opts) // may fail
		}
	}
	close(stop)
	<-done
	overlaytest.Compare(t, want, overlaytest.Tree(t, outside))
}

// TestUnpackMergedOverlay updates a mounted overlay. Its kernel escapes overlayfs's xattrs.
func TestUnpackMergedOverlay(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	lower, upper := filepath.Join(dir, "lower"), filepath.Join(dir, "upper")
	overlaytest.Build(t, lower, "file d/old \"x\"\nfile gone \"x\"\nfile e/f \"x\"")
	o := overlaytest.Mount(t, []string{lower}, upper, filepath.Join(dir, "work"), filepath.Join(dir, "merged"))
	layer := "file d/new \"y\"\nfile .wh.gone \"\"\nfile .wh.e \"\"\ndir e trusted.overlay.opaque=\"y\"\nfile e/g \"z\"\nfile d/.wh..wh..opq \"\""
	const opaque = " trusted.overlay.opaque=\"y\""
	// Before Linux 6.7 (commit dad02fad84cb) an overlay takes no overlay's xattrs.
	nested := true
	if err := unix.Setxattr(o.Merged+"/e", "trusted.overlay.test", []byte("y"), 0); errors.Is(err, unix.EOPNOTSUPP) {
		nested = false
		_, err := Unpack(context.Background(), o.Merged, bytes.NewReader(mustTar(t, "dir x"+opaque)), UnpackOptions{Format: Merged})
		if !errors.Is(err, unix.EOPNOTSUPP) {
			t.Errorf("an xattr that the mount does not take: %v", err)
		}
		must(t, os.RemoveAll(o.Merged+"/x"))
		layer = strings.Replace(layer, opaque, "", 1)
	} else {
		must(t, err)
	}
	mustUnpack(t, o.Merged, mustTar(t, layer), UnpackOptions{Format: Merged})
	want := `"d" dir 0755 0:0
"d/new" file 0644 0:0 size=1 sha256=a1fce4363854ff88
"e" dir 0755 0:0 trusted.overlay.opaque="y"
"e/g" file 0644 0:0 size=1 sha256=594e519ae499312b
`
	if !nested {
		want = strings.Replace(want, opaque, "", 1)
	}
	overlaytest.Compare(t, want, overlaytest.Tree(t, o.Merged, overlaytest.NoTimes, overlaytest.NoRoot))
	o.Unmount()
	if got := overlaytest.Tree(t, upper, overlaytest.NoTimes); nested && !strings.Contains(got, `trusted.overlay.overlay.opaque="y"`) {
		t.Error(got)
	}
}

// TestUnpackExtendedMegabyte: an extended header of 1 MiB works; a value that the kernel
// does not take is its error.
func TestUnpackExtendedMegabyte(t *testing.T) {
	overlaytest.Require(t, "root")
	comment := func(n int) string { return "file a \"x\" pax.comment=" + strings.Repeat("c", n) }
	mustUnpack(t, t.TempDir(), mustTar(t, comment(1<<20-40)), UnpackOptions{})
	_, err := Unpack(context.Background(), t.TempDir(), bytes.NewReader(mustTar(t, comment(1<<20))), UnpackOptions{})
	if !errors.Is(err, ErrFormat) {
		t.Error(err)
	}
	_, err = Unpack(context.Background(), t.TempDir(), bytes.NewReader(mustTar(t, "file a \"x\" user.a="+strings.Repeat("c", 70000))), UnpackOptions{})
	var entry *EntryError
	if !errors.As(err, &entry) || entry.Name != "a" {
		t.Error(err)
	}
}

// TestUnpackBoundedHeaders: many xattrs or fragments in one entry end in an error.
func TestUnpackBoundedHeaders(t *testing.T) {
	overlaytest.Require(t, "root")
	var many strings.Builder
	many.WriteString("file a \"x\"")
	for i := range maxXattrs + 1 {
		fmt.Fprintf(&many, " user.x%d=1", i)
	}
	_, err := Unpack(context.Background(), t.TempDir(), bytes.NewReader(mustTar(t, many.String())), UnpackOptions{})
	if !errors.Is(err, ErrFormat) {
		t.Error(err)
	}
	// A map of 1.0 that goes on and on, as long as the stream does.
	body := "2000000\n" + strings.Repeat("0\n", 1<<20)
	text := fmt.Sprintf("file a %q pax.GNU.sparse.major=1 pax.GNU.sparse.minor=0 pax.GNU.sparse.realsize=5", body)
	_, err = Unpack(context.Background(), t.TempDir(), bytes.NewReader(mustTar(t, text)), UnpackOptions{})
	if !errors.Is(err, ErrFormat) {
		t.Error(err)
	}
	// Old GNU extension blocks without end.
	header := mustTar(t, "sparse a fmt=gnu size=0 map=\""+strings.Repeat(`\x00`, 96)+"\\x01\"\nnoend")
	block := make([]byte, blockSize)
	for i := range fragmentsPerBlock {
		copy(block[i*fragmentSize:], "00000000000\x0000000000000\x00")
	}
	block[fragmentsPerBlock*fragmentSize] = 1
	r := io.MultiReader(bytes.NewReader(header), &repeatReader{block: block})
	if _, err = Unpack(context.Background(), t.TempDir(), r, UnpackOptions{}); !errors.Is(err, ErrFormat) {
		t.Error(err)
	}
}

// repeatReader repeats a block for ever.
type repeatReader struct {
	block []byte
	pos   int
}

func (r *repeatReader) Read(p []byte) (int, error) {
	n := copy(p, r.block[r.pos:])
	r.pos = (r.pos + n) % len(r.block)
	return n, nil
}

// TestUnpackAgain unpacks the same stream twice into one directory: the second time
// changes nothing but what is new each time.
func TestUnpackAgain(t *testing.T) {
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		stream := mixed(t, 200)
		first := mustUnpack(t, dir, stream, UnpackOptions{})
		want := overlaytest.Tree(t, dir)
		second := mustUnpack(t, dir, stream, UnpackOptions{})
		overlaytest.Compare(t, want, overlaytest.Tree(t, dir))
		if first.Size != second.Size {
			t.Errorf("size %d, then %d", first.Size, second.Size)
		}
	})
}

// TestUnpackConcurrently: two unpacks share nothing.
func TestUnpackConcurrently(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	stream := mixed(t, 300)
	want := t.TempDir()
	mustUnpack(t, want, stream, UnpackOptions{})
	no := overlaytest.NoDirTimes
	tree := overlaytest.Tree(t, want, no)
	t.Run("group", func(t *testing.T) {
		for i := range 6 {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				mustUnpack(t, dir, stream, UnpackOptions{})
				overlaytest.Compare(t, tree, overlaytest.Tree(t, dir, no))
			})
		}
	})
}

// TestUnpackBadOptions: what can't be right is refused before anything is read.
func TestUnpackBadOptions(t *testing.T) {
	stream := mixed(t, 1)
	if _, err := Unpack(context.Background(), filepath.Join(t.TempDir(), "missing"), bytes.NewReader(stream), UnpackOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Unpack(context.Background(), file, bytes.NewReader(stream), UnpackOptions{}); !errors.Is(err, unix.ENOTDIR) {
		t.Error(err)
	}
	if _, err := Unpack(context.Background(), t.TempDir(), bytes.NewReader(stream), UnpackOptions{Format: 9}); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	overlap := IDMap{UIDs: []IDRange{{0, 0, 10}, {5, 20, 10}}}
	if _, err := Unpack(context.Background(), t.TempDir(), bytes.NewReader(stream), UnpackOptions{IDMap: overlap}); err == nil {
		t.Error("overlapping id map")
	}
	if _, err := Unpack(context.Background(), t.TempDir(), bytes.NewReader(stream), UnpackOptions{Lowers: []string{"/does/not/exist"}}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestUnpackShuffled gives entries in any order, which costs lookups and changes nothing.
func TestUnpackShuffled(t *testing.T) {
	overlaytest.Require(t, "root")
	var lines []string
	for i := range 300 {
		lines = append(lines, fmt.Sprintf("dir d%d/e%d 0755 mtime=%d", i%5, i%50, i%50), fmt.Sprintf("file d%d/e%d/f%d \"x\"", i%5, i%50, i))
	}
	for i := range 5 {
		lines = append(lines, fmt.Sprintf("dir d%d mtime=%d", i, i))
	}
	want := t.TempDir()
	mustUnpack(t, want, mustTar(t, strings.Join(lines, "\n")), UnpackOptions{})
	tree := overlaytest.Tree(t, want, overlaytest.NoRootTime)
	for seed := range uint64(5) {
		rng := rand.New(rand.NewPCG(seed, 1))
		rng.Shuffle(len(lines), func(i, j int) { lines[i], lines[j] = lines[j], lines[i] })
		dir := t.TempDir()
		mustUnpack(t, dir, mustTar(t, strings.Join(lines, "\n")), UnpackOptions{})
		overlaytest.Compare(t, tree, overlaytest.Tree(t, dir, overlaytest.NoRootTime))
	}
}

// TestUnpackCloseOnExec looks at all descriptors while an unpack is at work: none may be
// inherited by a program that the process happens to start then.
func TestUnpackCloseOnExec(t *testing.T) {
	overlaytest.Require(t, "root")
	inherited := func() (n int) {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range fds {
			fd, err := strconv.Atoi(e.Name())
			if err != nil {
				t.Fatal(err)
			}
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
				n++
			}
		}
		return n
	}
	lower := t.TempDir()
	overlaytest.Build(t, lower, "file d/sub0/low \"x\"")
	stream, before := bytes.NewReader(mixed(t, 400)), inherited()
	_, err := Unpack(context.Background(), t.TempDir(), readerFunc(func(p []byte) (int, error) {
		if n := inherited(); n > before {
			t.Errorf("%d descriptors more would be inherited", n-before)
		}
		return stream.Read(p[:min(len(p), 100<<10)])
	}), UnpackOptions{Lowers: []string{lower}})
	if err != nil {
		t.Fatal(err)
	}
}

func BenchmarkUnpack(b *testing.B) {
	overlaytest.Require(b, "root", "tmpfs")
	top := overlaytest.MountFS(b, overlaytest.FS{Name: "tmpfs", Options: "nr_inodes=0"})
	for name, c := range map[string]struct{ files, size int }{"small": {5000, 2000}, "big": {4, 32 << 20}} {
		var text strings.Builder
		for i := range c.files {
			if i%50 == 0 {
				fmt.Fprintf(&text, "dir usr/share/d%d\n", i/50)
			}
			fmt.Fprintf(&text, "file usr/share/d%d/file%d \"%s\"\n", i/50, i, strings.Repeat("x", c.size))
		}
		stream := mustTar(b, text.String())
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(stream)))
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				dir, err := os.MkdirTemp(top, "")
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				mustUnpack(b, dir, stream, UnpackOptions{})
				b.StopTimer()
				if err := os.RemoveAll(dir); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
