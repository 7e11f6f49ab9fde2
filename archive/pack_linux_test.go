package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// packed packs dir and returns the bytes.
func packed(t testing.TB, dir string, opts PackOptions) []byte {
	t.Helper()
	r, err := Pack(context.Background(), dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Stats().TarBytes; got != int64(len(b)) {
		t.Errorf("stats say %d bytes of %d", got, len(b))
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return b
}

// entries reads a tar with archive/tar: "name type mode uid:gid size mtime link xattrs content".
func entries(t testing.TB, b []byte) []string {
	t.Helper()
	var out []string
	tr := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(content)) != h.Size {
			t.Errorf("%s: %d bytes of %d", h.Name, len(content), h.Size)
		}
		s := fmt.Sprintf("%s %c %o %d:%d", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid)
		if h.Linkname != "" {
			s += " -> " + h.Linkname
		}
		if len(content) > 0 && len(content) < 50 {
			s += fmt.Sprintf(" %q", content)
		} else if h.Size > 0 {
			s += fmt.Sprintf(" %d", h.Size)
		}
		var attrs []string
		for k, v := range h.PAXRecords {
			if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
				attrs = append(attrs, fmt.Sprintf(" %s=%q", name, v))
			}
		}
		slices.Sort(attrs)
		out = append(out, s+strings.Join(attrs, ""))
	}
}

func wantEntries(t *testing.T, got []string, want string) {
	t.Helper()
	if g := strings.Join(got, "\n"); g != strings.TrimSpace(want) {
		t.Errorf("got:\n%s\nwant:\n%s", g, strings.TrimSpace(want))
	}
}

func TestPackTypes(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "a/f"), []byte("hello"), 0o640))
	must(t, os.WriteFile(filepath.Join(dir, "a-"), nil, 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "a.c"), nil, 0o600))
	must(t, unix.Chmod(filepath.Join(dir, "a/f"), 0o4750))
	must(t, os.Link(filepath.Join(dir, "a/f"), filepath.Join(dir, "a/b/g")))
	must(t, os.Symlink("../x", filepath.Join(dir, "l")))
	must(t, os.Link(filepath.Join(dir, "l"), filepath.Join(dir, "m")))
	must(t, unix.Mkfifo(filepath.Join(dir, "p"), 0o644))
	must(t, unix.Mknod(filepath.Join(dir, "zero"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
	must(t, unix.Mknod(filepath.Join(dir, "disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 300))))
	must(t, unix.Mknod(filepath.Join(dir, "sock"), unix.S_IFSOCK|0o660, 0))
	must(t, os.Lchown(filepath.Join(dir, "l"), 3, 2000000000))
	must(t, unix.Setxattr(filepath.Join(dir, "a"), "user.x", []byte("v\x00w"), 0))
	must(t, unix.Lsetxattr(filepath.Join(dir, "l"), "trusted.y", []byte("z"), 0))
	must(t, unix.Lsetxattr(filepath.Join(dir, "p"), "trusted.overlay.origin", []byte("z"), 0))
	wantEntries(t, entries(t, packed(t, dir, PackOptions{})), `
a/ 5 755 0:0 user.x="v\x00w"
a/b/ 5 755 0:0
a/b/g 0 4750 0:0 "hello"
a/f 1 4750 0:0 -> a/b/g
a- 0 600 0:0
a.c 0 600 0:0
disk 4 640 0:0
l 2 777 3:2000000000 -> ../x trusted.y="z"
m 1 777 3:2000000000 -> l
p 6 644 0:0
zero 3 644 0:0`)
}

// A file's capability is in the entry of each of its names: moby and containerd change the owner of what a link leads
// to, which takes the capability away, and then set the xattrs of the link's entry. To Unpack it makes no difference.
func TestPackLinkCapability(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	const value = `security.capability="\x01\x00\x00\x02\x00 ` + `\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"`
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	dir, to, old := filepath.Join(base, "d"), filepath.Join(base, "to"), filepath.Join(base, "old")
	overlaytest.Build(t, dir, "dir . 0755 mtime=1.0\nfile a \"x\" 0755 mtime=1.0 user.a=1 "+value+"\nlink b -> a mtime=1.0\nlink c -> a mtime=1.0\nfifo p\nlink q -> p mtime=1.0\n")
	b := packed(t, dir, PackOptions{})
	wantEntries(t, entries(t, b), "a 0 755 0:0 \"x\" "+value+" user.a=\"1\"\nb 1 755 0:0 -> a "+value+"\nc 1 755 0:0 -> a "+value+"\np 6 644 0:0\nq 1 644 0:0 -> p")
	unpackInto(t, to, b, UnpackOptions{})
	overlaytest.Compare(t, overlaytest.Tree(t, dir, overlaytest.NoRoot), overlaytest.Tree(t, to, overlaytest.NoRoot))
	unpackInto(t, old, mustTar(t, "file a \"x\" 0755 mtime=1 user.a=1 "+value+"\nlink b -> a\nlink c -> a\nfifo p mtime=1\nlink q -> p\n"), UnpackOptions{})
	overlaytest.Compare(t, overlaytest.Tree(t, dir, overlaytest.NoRoot), overlaytest.Tree(t, old, overlaytest.NoRoot))
	if !bytes.Equal(packed(t, old, PackOptions{}), b) {
		t.Error("another tar")
	}
}

// Every piece size gives the same bytes, and the same tree does.
func TestPackDeterministic(t *testing.T) {
	overlaytest.Require(t, "root")
	dir := t.TempDir()
	overlaytest.Build(t, dir, everything+"file big size=5M data=0:\"a\" data=1M:\"b\"")
	want := packed(t, dir, PackOptions{})
	for _, size := range []int{1, 511, 4096, 70000, 3 << 20} {
		r, err := Pack(context.Background(), dir, PackOptions{})
		must(t, err)
		var got bytes.Buffer
		var in io.Reader = r
		if size == 1 {
			in = io.LimitReader(r, 5000)
		}
		_, err = io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{in}, make([]byte, size))
		must(t, err)
		must(t, r.Close())
		if !bytes.HasPrefix(want, got.Bytes()) || (size > 1 && got.Len() != len(want)) {
			t.Errorf("pieces of %d bytes: another archive", size)
		}
		if _, err := r.Read(make([]byte, 10)); !errors.Is(err, os.ErrClosed) {
			t.Errorf("read after close: %v", err)
		}
	}
	r, err := Pack(context.Background(), dir, PackOptions{})
	must(t, err)
	var got bytes.Buffer
	_, err = r.WriteTo(&got)
	must(t, err)
	if !bytes.Equal(got.Bytes(), want) {
		t.Error("WriteTo: another archive")
	}
}

func BenchmarkPack(b *testing.B) {
	dir := benchTree(b)
	b.Run("writeto", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			r, err := Pack(context.Background(), dir, PackOptions{})
			if err != nil {
				b.Fatal(err)
			}
			n, err := r.WriteTo(io.Discard)
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(n)
			_ = r.Close()
		}
	})
	b.Run("pipe", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			r, err := Pack(context.Background(), dir, PackOptions{})
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, 32<<10)); err != nil {
				b.Fatal(err)
			}
			_ = r.Close()
		}
	})
}

// blocks is what a file takes on disk, in 512 bytes.
func blocks(t *testing.T, dir, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(filepath.Join(dir, name), &st))
	return st.Blocks
}
