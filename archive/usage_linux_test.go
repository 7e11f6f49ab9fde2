package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "a/f"), make([]byte, 1000), 0o644))
	must(t, os.Link(filepath.Join(dir, "a/f"), filepath.Join(dir, "a/b/g")))
	must(t, os.Link(filepath.Join(dir, "a/f"), filepath.Join(dir, "h")))
	must(t, os.Symlink("12345", filepath.Join(dir, "l")))
	must(t, unix.Mkfifo(filepath.Join(dir, "p"), 0o644))
	must(t, unix.Mknod(filepath.Join(dir, "w"), unix.S_IFCHR, 0))
	got, err := Usage(context.Background(), dir)
	must(t, err)
	if want := (Stats{Size: 1005, Entries: 8}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// 3,000 nested directories need neither as many descriptors nor a path that long.
func TestUsageDeep(t *testing.T) {
	dir := t.TempDir()
	deep(t, dir, 3000)
	got, err := Usage(context.Background(), dir)
	must(t, err)
	if got.Entries != 3001 || got.Size != 3 {
		t.Errorf("got %+v", got)
	}
	must(t, os.RemoveAll(dir))
}

// deep makes n directories within each other, with a file of 3 bytes at the bottom.
func deep(t testing.TB, dir string, n int) {
	t.Helper()
	at, err := unix.Open(dir, unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n + 1 {
		if i == n {
			fd, err := unix.Openat(at, "f", unix.O_CREAT|unix.O_WRONLY, 0o644)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = unix.Write(fd, []byte("abc"))
			_ = unix.Close(fd)
			break
		}
		if err := unix.Mkdirat(at, "ddd", 0o755); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Openat(at, "ddd", unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_ = unix.Close(at)
		at = fd
	}
	_ = unix.Close(at)
}

// The workers share a large tree without counting anything twice, and tell of its errors.
func TestUsageShared(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	var entries, size int64
	for i := range 40 {
		dir := filepath.Join(base, fmt.Sprint(i%3), fmt.Sprint(i%7), fmt.Sprint(i))
		must(t, os.MkdirAll(dir, 0o755))
		for j := range 60 {
			must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(j)), make([]byte, j), 0o644))
			size += int64(j)
		}
		must(t, os.Link(filepath.Join(dir, "7"), filepath.Join(base, fmt.Sprint("link", i))))
	}
	must(t, filepath.WalkDir(base, func(string, fs.DirEntry, error) error { entries++; return nil }))
	for range 30 {
		got, err := Usage(context.Background(), base)
		must(t, err)
		if want := (Stats{Entries: entries - 1, Size: size}); got != want {
			t.Fatalf("got %+v, want %+v", got, want)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	_, err := Usage(context.Background(), filepath.Join(t.TempDir(), "none"))
	var e *EntryError
	if !errors.As(err, &e) || e.Op != "usage" || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing directory: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
	if _, err := Usage(ctx, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func BenchmarkUsage(b *testing.B) {
	dir := benchTree(b)
	b.Run("usage", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := Usage(context.Background(), dir); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("bare", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			fd, err := unix.Open(dir, unix.O_DIRECTORY, 0)
			if err != nil {
				b.Fatal(err)
			}
			bareWalk(b, fd, make([]byte, 32<<10))
		}
	})
}

// bareWalk is the least that counts a tree.
func bareWalk(b *testing.B, fd int, buf []byte) int64 {
	var dirs []string
	var size int64
	for {
		n, err := syscall.Getdents(fd, buf)
		if err != nil {
			b.Fatal(err)
		}
		if n == 0 {
			break
		}
		for p := buf[:n]; len(p) > 0; {
			l := int(p[16]) | int(p[17])<<8
			name := p[19:l]
			for i, c := range name {
				if c == 0 {
					name = name[:i]
					break
				}
			}
			s := string(name)
			if p[18] == unix.DT_DIR {
				if s != "." && s != ".." {
					dirs = append(dirs, s)
				}
			} else {
				var st unix.Stat_t
				if err := unix.Fstatat(fd, s, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
					b.Fatal(err)
				}
				size += st.Size
			}
			p = p[l:]
		}
	}
	for _, d := range dirs {
		sub, err := unix.Openat(fd, d, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			b.Fatal(err)
		}
		size += bareWalk(b, sub, buf)
	}
	_ = unix.Close(fd)
	return size
}

// benchTree makes a tree of 20,000 files in 1,500 directories; BENCHTREE names another.
func benchTree(b testing.TB) string {
	if dir := os.Getenv("BENCHTREE"); dir != "" {
		return dir
	}
	dir := b.TempDir()
	data := make([]byte, 8<<10)
	for i := range 1500 {
		sub := filepath.Join(dir, fmt.Sprint(i%10), fmt.Sprint(i/10%10), fmt.Sprint(i))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			b.Fatal(err)
		}
		for j := range 13 {
			name := filepath.Join(sub, fmt.Sprint("file", j))
			if err := os.WriteFile(name, data[:j*600], 0o644); err != nil {
				b.Fatal(err)
			}
			if err := os.Chtimes(name, unixTime(i), unixTime(i)); err != nil {
				b.Fatal(err)
			}
		}
	}
	return dir
}
