package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// begun packs dir and reads the first n bytes in place.
func begun(t *testing.T, dir string, n int, opts PackOptions) Reader {
	t.Helper()
	r, err := Pack(context.Background(), dir, opts)
	must(t, err)
	_, err = io.ReadFull(r, make([]byte, n))
	must(t, err)
	return r
}

// rest reads what is left, for its error.
func rest(t *testing.T, r Reader) error {
	t.Helper()
	_, err := io.Copy(io.Discard, r)
	must(t, r.Close())
	return err
}

// Whatever happens to a tree while it is packed, the stream is an archive of it or ends
// in an error (moby's ends a cut archive as if it were whole).
func TestPackTreeChangesMeanwhile(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	for _, c := range []struct {
		name string
		// do happens when half of the file a/big was read.
		do   func(dir string) error
		want error
		file string
	}{
		{"nothing", func(string) error { return nil }, nil, ""},
		{"file shrinks", func(dir string) error { return os.Truncate(dir+"/a/big", 1<<19+5) }, ErrChanged, "a/big"},
		{"file becomes empty", func(dir string) error { return os.Truncate(dir+"/a/big", 0) }, ErrChanged, "a/big"},
		{"file grows", func(dir string) error { return os.Truncate(dir+"/a/big", 1<<30) }, nil, ""},
		{"file vanishes while it is read", func(dir string) error { return os.Remove(dir + "/a/big") }, nil, ""},
		{"file vanishes before it is read", func(dir string) error { return os.Remove(dir + "/a/c") }, fs.ErrNotExist, "a/c"},
		{"symlink vanishes", func(dir string) error { return os.Remove(dir + "/a/l") }, fs.ErrNotExist, "a/l"},
		{"directory vanishes", func(dir string) error { return os.RemoveAll(dir + "/d") }, fs.ErrNotExist, "d/"},
		{"listed directory vanishes", func(dir string) error { return os.RemoveAll(dir + "/a/dir") }, fs.ErrNotExist, "a/dir/"},
		{"file becomes a symlink", func(dir string) error {
			return errors.Join(os.Remove(dir+"/a/c"), os.Symlink("/etc/shadow", dir+"/a/c"))
		}, ErrChanged, "a/c"},
		{"file becomes a fifo", func(dir string) error {
			return errors.Join(os.Remove(dir+"/a/c"), unix.Mkfifo(dir+"/a/c", 0o644))
		}, ErrChanged, "a/c"},
		{"directory becomes a symlink", func(dir string) error {
			return errors.Join(os.RemoveAll(dir+"/a/dir"), os.Symlink("/etc", dir+"/a/dir"))
		}, ErrChanged, "a/dir/"},
		{"directory becomes a file", func(dir string) error {
			return errors.Join(os.RemoveAll(dir+"/a/dir"), os.WriteFile(dir+"/a/dir", nil, 0o644))
		}, ErrChanged, "a/dir/"},
		{"symlink becomes a file", func(dir string) error {
			return errors.Join(os.Remove(dir+"/a/l"), os.WriteFile(dir+"/a/l", nil, 0o644))
		}, ErrChanged, "a/l"},
		{"directory is moved away while it is read", func(dir string) error { return os.Rename(dir+"/a", dir+"/z") }, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			overlaytest.NoLeaks(t)
			base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
			dir := filepath.Join(base, "tree")
			overlaytest.Build(t, dir, "file a/big\nfile a/c \"c\"\nsymlink a/l -> c\nfile a/dir/f \"x\"\nfile d/e")
			must(t, os.WriteFile(filepath.Join(dir, "a/big"), bytes.Repeat([]byte("x"), 1<<20), 0o644))
			r := begun(t, dir, 1<<19, PackOptions{})
			must(t, c.do(dir))
			err := rest(t, r)
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if e := (*EntryError)(nil); c.want != nil && (!errors.As(err, &e) || e.Name != c.file) {
				t.Errorf("error %v is not of %s", err, c.file)
			}
		})
	}
}

// A directory that is moved while Pack is far below it is found changed on the way back.
func TestPackDeepMoved(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	path := strings.Repeat("d/", 200)
	must(t, os.MkdirAll(filepath.Join(base, "tree", path), 0o755))
	must(t, os.Mkdir(filepath.Join(base, "other"), 0o755))
	must(t, os.WriteFile(filepath.Join(base, "tree", path, "big"), bytes.Repeat([]byte("x"), 1<<20), 0o644))
	r := begun(t, filepath.Join(base, "tree"), 600<<10, PackOptions{})
	must(t, os.Rename(filepath.Join(base, "tree/d/d/d"), filepath.Join(base, "other/d")))
	if err := rest(t, r); !errors.Is(err, ErrChanged) {
		t.Errorf("got %v", err)
	}
}

// 2,000 nested directories take linear time (moby needs 12 s), and few descriptors.
func TestPackDeep(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	deep(t, base, 2000)
	must(t, os.Chmod(base, 0o755))
	start := time.Now()
	b := packed(t, base, PackOptions{})
	to := filepath.Join(t.TempDir(), "to")
	unpackInto(t, to, b, UnpackOptions{})
	if !bytes.Equal(packed(t, to, PackOptions{}), b) {
		t.Error("the unpacked tree gives another tar")
	}
	c, err := Compare(context.Background(), base, to)
	must(t, err)
	if len(c) > 0 {
		t.Errorf("%d changes", len(c))
	}
	c, err = Changes(context.Background(), base, ReadOptions{Lowers: []string{to}})
	must(t, err)
	if len(c) > 0 {
		t.Errorf("%d changes", len(c))
	}
	if took := time.Since(start); took > 2*time.Minute {
		t.Errorf("took %v", took)
	}
}

// Close after any number of bytes releases everything and says nothing; dockerd closes a
// Diff after a few bytes to see what it is.
func TestPackCloseEarly(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	overlaytest.Build(t, dir, everything)
	whole := len(packed(t, dir, PackOptions{Lowers: []string{dir}}))
	r := rand.New(rand.NewPCG(1, 1))
	for range 200 {
		p, err := Pack(context.Background(), dir, PackOptions{Lowers: []string{dir}})
		must(t, err)
		n := r.IntN(whole)
		_, err = io.CopyN(io.Discard, struct{ io.Reader }{p}, int64(n))
		must(t, err)
		must(t, p.Close())
		must(t, p.Close())
		if _, err := p.Read(make([]byte, 1)); !errors.Is(err, fs.ErrClosed) {
			t.Fatalf("read after close: %v", err)
		}
		if _, err := p.WriteTo(io.Discard); !errors.Is(err, fs.ErrClosed) {
			t.Fatalf("write after close: %v", err)
		}
	}
}

// A reader that is dropped in the middle of a Read by another goroutine is safe.
func TestPackCloseMeanwhile(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	overlaytest.Build(t, dir, everything)
	for i := range 50 {
		r, err := Pack(context.Background(), dir, PackOptions{})
		must(t, err)
		done := make(chan error)
		go func() {
			_, err := io.Copy(io.Discard, r)
			done <- err
		}()
		time.Sleep(time.Duration(i) * 20 * time.Microsecond)
		must(t, r.Close())
		if err := <-done; err != nil && !errors.Is(err, fs.ErrClosed) {
			t.Error(err)
		}
	}
}

func TestPackCancelled(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "big"), make([]byte, 1<<20), 0o644))
	ctx, cancel := context.WithCancel(context.Background())
	r, err := Pack(ctx, dir, PackOptions{})
	must(t, err)
	_, err = io.ReadFull(r, make([]byte, 1000))
	must(t, err)
	cancel()
	if err := rest(t, r); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// failWriter takes n bytes.
type failWriter struct{ n int }

func (w *failWriter) Write(b []byte) (int, error) {
	if len(b) > w.n {
		return w.n, unix.ENOSPC
	}
	w.n -= len(b)
	return len(b), nil
}

func TestPackWriterFails(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	overlaytest.Build(t, dir, "file big size=5M data=0:a data=4999999:b")
	r, err := Pack(context.Background(), dir, PackOptions{})
	must(t, err)
	n, err := r.WriteTo(&failWriter{n: 700})
	if n != 700 || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%d bytes, %v", n, err)
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("then %v", err)
	}
	must(t, r.Close())
}

// A missing directory is an error, not an empty archive (as with moby); so is a missing lower.
func TestPackMissing(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	none := filepath.Join(dir, "none")
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, nil, 0o644))
	must(t, os.Symlink(dir, filepath.Join(dir, "link")))
	for _, c := range []struct {
		dir  string
		opts PackOptions
		err  error
	}{
		{none, PackOptions{}, fs.ErrNotExist},
		{file, PackOptions{}, unix.ENOTDIR},
		{filepath.Join(dir, "link"), PackOptions{}, unix.ENOTDIR},
		{dir, PackOptions{Lowers: []string{dir, none}}, fs.ErrNotExist},
	} {
		_, err := Pack(context.Background(), c.dir, c.opts)
		if e := (*EntryError)(nil); !errors.Is(err, c.err) || !errors.As(err, &e) {
			t.Errorf("%s: %v", c.dir, err)
		}
		_, err = Changes(context.Background(), c.dir, ReadOptions{Lowers: c.opts.Lowers})
		if e := (*EntryError)(nil); !errors.Is(err, c.err) || !errors.As(err, &e) {
			t.Errorf("changes of %s: %v", c.dir, err)
		}
	}
	_, err := Compare(context.Background(), dir, none)
	if e := (*EntryError)(nil); !errors.Is(err, fs.ErrNotExist) || !errors.As(err, &e) {
		t.Errorf("compare: %v", err)
	}
}

// A filesystem that dies under Pack is an error of Read.
func TestPackDeadFilesystem(t *testing.T) {
	overlaytest.Require(t, "root", "ext4")
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "ext4", Size: 256 << 20}) // of its own, as it dies
	dir := filepath.Join(base, "tree")
	var tree strings.Builder
	for _, name := range overlaytest.Names(100) {
		fmt.Fprintf(&tree, "file %q size=64K data=0:x\n", "d/"+name)
	}
	overlaytest.Build(t, dir, tree.String())
	must(t, os.WriteFile(filepath.Join(dir, "a"), bytes.Repeat([]byte("x"), 1<<20), 0o644))
	r := begun(t, dir, 1<<19, PackOptions{})
	const shutdown, noLogFlush = 0x8004587d, 2 // FS_IOC_SHUTDOWN
	fd, err := unix.Open(base, unix.O_DIRECTORY, 0)
	must(t, err)
	must(t, unix.IoctlSetPointerInt(fd, shutdown, noLogFlush))
	must(t, unix.Close(fd))
	err = rest(t, r)
	if e := (*EntryError)(nil); !errors.As(err, &e) || !errors.Is(err, unix.EIO) {
		t.Errorf("got %v", err)
	}
}

// Progress is told the counts, at the end those of the whole.
func TestPackProgress(t *testing.T) {
	overlaytest.Require(t, "root")
	dir := t.TempDir()
	overlaytest.Build(t, dir, everything)
	must(t, unix.Mknod(filepath.Join(dir, "sock"), unix.S_IFSOCK|0o600, 0))
	var last Stats
	r, err := Pack(context.Background(), dir, PackOptions{Progress: func(s Stats) { last = s }})
	must(t, err)
	n, err := io.Copy(io.Discard, r)
	must(t, err)
	must(t, r.Close())
	usage, err := Usage(context.Background(), dir)
	must(t, err)
	if last.TarBytes != n || last.Size != usage.Size || last.SkippedSockets != 1 || last.Entries != usage.Entries {
		t.Errorf("progress %+v, usage %+v, %d bytes", last, usage, n)
	}
	if r.Stats() != last {
		t.Errorf("stats %+v, progress %+v", r.Stats(), last)
	}
}

// Directories 2,000 deep over as deep lowers need few descriptors: 250 suffice for all calls.
func TestReadDeepFewDescriptors(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	low, up := filepath.Join(base, "low"), filepath.Join(base, "up")
	for _, dir := range []string{low, up} {
		must(t, os.Mkdir(dir, 0o755))
		deep(t, dir, 2000)
		nested(t, dir, func(fd, depth int) error {
			if dir == low {
				return unix.Mknodat(fd, "z", unix.S_IFREG|0o644, 0)
			}
			return unix.Mknodat(fd, "z", unix.S_IFCHR, 0)
		})
	}
	var was unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 250, Max: was.Max}))
	defer func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was)) }()
	lowers := []string{low}
	if n := strings.Count(listed(t, packed(t, up, PackOptions{Lowers: lowers})), "/.wh.z "); n != 2000 {
		t.Errorf("Pack wrote %d whiteouts", n)
	}
	changes, err := Changes(context.Background(), up, ReadOptions{Lowers: lowers})
	must(t, err)
	deleted := 0
	for _, c := range changes {
		if c.Kind == Deleted {
			deleted++
		}
	}
	if deleted != 2001 {
		t.Errorf("Changes found %d deletions", deleted)
	}
	changes, err = Compare(context.Background(), up, low)
	must(t, err)
	if len(changes) != 4002 {
		t.Errorf("Compare found %d changes", len(changes))
	}
	usage, err := Usage(context.Background(), low)
	must(t, err)
	if usage.Entries != 4002 {
		t.Errorf("Usage found %d entries", usage.Entries)
	}
}

// nested calls f for each directory that deep made.
func nested(t *testing.T, dir string, f func(fd, depth int) error) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	for depth := 0; ; depth++ {
		must(t, f(fd, depth))
		next, err := unix.Openat(fd, "ddd", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, unix.Close(fd))
		if err != nil {
			return
		}
		fd = next
	}
}
