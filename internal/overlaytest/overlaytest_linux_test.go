package overlaytest

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

func TestFields(t *testing.T) {
	got := fields(" root, overlay ,,xfs")
	if want := "[root overlay xfs]"; strings.Join(got, " ") != strings.Trim(want, "[]") {
		t.Errorf("fields = %q, want %s", got, want)
	}
	if !required("root,xfs", "xfs") || !required("all", "xfs") || required("root", "xfs") || required("", "xfs") {
		t.Error("required reads its list wrongly")
	}
}

func TestNames(t *testing.T) {
	seen := make(map[string]bool)
	for _, name := range Names(500) {
		if seen[name] || name == "" || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
			t.Fatalf("bad name %q", name)
		}
		seen[name] = true
	}
}

func TestDiff(t *testing.T) {
	tests := []struct{ name, want, got, diff string }{
		{"same", "a\nb\n", "a\nb\n", ""},
		{"missing", "a\nb\nc\n", "a\nc\n", "- b\n"},
		{"extra", "a\nc\n", "a\nb\nc\n", "+ b\n"},
		{"changed", "a\nb 1\nc\n", "a\nb 2\nc\n", "- b 1\n+ b 2\n"},
		{"all", "a\n", "b\n", "- a\n+ b\n"},
		{"tail", "a\nb", "a", "- b\n"},
		{"empty", "", "a", "- \n+ a\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := Diff(tt.want, tt.got); got != tt.diff {
				t.Errorf("Diff = %q, want %q", got, tt.diff)
			}
		})
	}
}

func TestUnescapeMountinfo(t *testing.T) {
	if got := unescapeMountinfo(`/a\040b\134c`); got != `/a b\c` {
		t.Errorf("got %q", got)
	}
}

// fakeT stands for a test that is expected to fail or to be skipped.
type fakeT struct {
	testing.TB
	cleanups []func()
	errors   []string
	skipped  string
}

func (f *fakeT) Helper()          {}
func (f *fakeT) Cleanup(c func()) { f.cleanups = append(f.cleanups, c) }
func (f *fakeT) Errorf(format string, args ...any) {
	f.errors = append(f.errors, fmt.Sprintf(format, args...))
}
func (f *fakeT) Error(args ...any) { f.errors = append(f.errors, fmt.Sprint(args...)) }
func (f *fakeT) Fatalf(format string, args ...any) {
	f.Errorf(format, args...)
	runtime.Goexit()
}
func (f *fakeT) Skipf(format string, args ...any) {
	f.skipped = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// run calls f and then its cleanups, as the testing package does.
func (f *fakeT) run(test func(t testing.TB)) {
	var wg sync.WaitGroup
	wg.Go(func() { test(f) })
	wg.Wait()
	for i := len(f.cleanups) - 1; i >= 0; i-- {
		f.cleanups[i]()
	}
}

func TestRequire(t *testing.T) {
	Require(t, "linux", "proc")

	t.Setenv(requireEnv, "")
	f := &fakeT{TB: t}
	f.run(func(t testing.TB) { Require(t, "cmd:no-such-program") })
	if f.skipped == "" || len(f.errors) > 0 {
		t.Errorf("a missing need: skipped %q, errors %q", f.skipped, f.errors)
	}

	t.Setenv(requireEnv, "root,cmd:no-such-program")
	f = &fakeT{TB: t}
	f.run(func(t testing.TB) { Require(t, "cmd:no-such-program") })
	if f.skipped != "" || len(f.errors) != 1 {
		t.Errorf("a missing need that is required: skipped %q, errors %q", f.skipped, f.errors)
	}

	f = &fakeT{TB: t}
	f.run(func(t testing.TB) { Require(t, "no-such-need") })
	if len(f.errors) != 1 {
		t.Errorf("an unknown need: errors %q", f.errors)
	}
}

func TestEachFS(t *testing.T) {
	NoLeaks(t)
	magic := map[string]int64{
		"ext4": unix.EXT4_SUPER_MAGIC, "tmpfs": unix.TMPFS_MAGIC, "xfs": unix.XFS_SUPER_MAGIC, "btrfs": unix.BTRFS_SUPER_MAGIC,
	}
	EachFS(t, func(t *testing.T, dir string) {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		if name := filepath.Base(t.Name()); int64(st.Type) != magic[name] {
			t.Errorf("%s is of type %#x", dir, st.Type)
		}
		if got := Tree(t, dir, NoRoot); got != "" {
			t.Errorf("the directory is not empty:\n%s", got)
		}
		Build(t, dir, `file a "x" user.a="1"`)
	})
}

// TestMountLeft: what a test leaves mounted on its filesystem is reported, and gone.
func TestMountLeft(t *testing.T) {
	Require(t, "root", "tmpfs")
	NoLeaks(t)
	f := &fakeT{TB: t}
	f.run(func(t testing.TB) {
		sub := filepath.Join(MountFS(t, FS{Name: "tmpfs"}), "sub")
		if err := os.Mkdir(sub, 0o755); err != nil {
			t.Fatalf("%v", err)
		}
		if err := unix.Mount("tmpfs", sub, "tmpfs", 0, ""); err != nil {
			t.Fatalf("%v", err)
		}
	})
	if len(f.errors) != 1 || !strings.Contains(f.errors[0], "left mounted") {
		t.Errorf("errors %q", f.errors)
	}
}

func TestNoLeaksFinds(t *testing.T) {
	Require(t, "root", "proc")
	var undo []func()
	defer func() {
		for _, f := range undo {
			f()
		}
	}()
	leak := func(name string, f func(t testing.TB)) {
		t.Run(name, func(t *testing.T) {
			fake := &fakeT{TB: t}
			fake.run(func(t testing.TB) { noLeaks(t, 100*time.Millisecond); f(t) })
			if len(fake.errors) == 0 || !strings.Contains(strings.Join(fake.errors, "\n"), name) {
				t.Errorf("found %q", fake.errors)
			}
		})
	}
	leak("descriptor", func(testing.TB) {
		fd, err := unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		undo = append(undo, func() { unix.Close(fd) })
	})
	leak("goroutine", func(testing.TB) {
		stop := make(chan struct{})
		go func() { <-stop }()
		undo = append(undo, func() { close(stop) })
	})
	leak("thread", func(testing.TB) {
		stop, ready, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
		// Never the process's first thread: that one would stay, with a working directory of its own, for all later tests.
		go func() { ended <- sys.OnOwnThread(func() error { close(ready); <-stop; return nil }) }()
		select {
		case <-ready:
		case err := <-ended:
			t.Fatal(err)
		}
		undo = append(undo, func() { close(stop) })
	})
	leak("mount", func(tb testing.TB) {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		undo = append(undo, func() { unix.Unmount(dir, unix.MNT_DETACH) })
	})
}

const sample = `
# a bit of everything
dir  . 0711 user.root="r"
dir  etc 0700 uid=1 gid=2 mtime=-5.000000001 user.a="x y" user.b="\x00"
file etc/passwd 04755 uid=7 gid=8 "root:x:0:0\n"
file "a b" size=1M data=512K:"middle"
symlink bin -> "usr/b n"
link zlink -> etc/passwd
char dev/null 0666 1:3
block dev/sda 8:300
fifo run/pipe 0600
whiteout etc/motd
opaque var/cache
`

const sampleTree = `"." dir 0711 0:0 mtime=1000000000.000000000 user.root="r"
"a b" file 0644 0:0 size=1048576 mtime=1000000000.000000000 sha256=bed74aa175e364aa
"bin" symlink 0777 0:0 mtime=1000000000.000000000 -> "usr/b n"
"dev" dir 0755 0:0 mtime=1000000000.000000000
"dev/null" char 0666 0:0 1:3 mtime=1000000000.000000000
"dev/sda" block 0644 0:0 8:300 mtime=1000000000.000000000
"etc" dir 0700 1:2 mtime=-5.000000001 user.a="x y" user.b="\x00"
"etc/motd" char 0000 0:0 0:0 mtime=1000000000.000000000
"etc/passwd" file 4755 7:8 size=11 mtime=1000000000.000000000 sha256=7cf1f940025c27c7 link=1
"run" dir 0755 0:0 mtime=1000000000.000000000
"run/pipe" fifo 0600 0:0 mtime=1000000000.000000000
"var" dir 0755 0:0 mtime=1000000000.000000000
"var/cache" dir 0755 0:0 mtime=1000000000.000000000 trusted.overlay.opaque="y"
"zlink" file 4755 7:8 size=11 mtime=1000000000.000000000 sha256=7cf1f940025c27c7 link=1
`

func TestBuildTree(t *testing.T) {
	Require(t, "root", "mknod")
	EachFS(t, func(t *testing.T, dir string) {
		Build(t, dir, sample)
		Compare(t, sampleTree, Tree(t, dir))
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, "a b"), &st); err != nil {
			t.Fatal(err)
		}
		if st.Blocks*512 >= st.Size {
			t.Errorf("a sparse file takes %d bytes", st.Blocks*512)
		}
		for _, opts := range []struct {
			skip TreeOption
			word string
		}{
			{NoTimes, "mtime="}, {NoOverlayXattrs, "trusted.overlay"}, {NoXattrs, "user."}, {NoOwners, "7:8"},
			{NoHardlinks, "link="}, {NoRoot, `"."`},
		} {
			if got := Tree(t, dir, opts.skip); strings.Contains(got, opts.word) {
				t.Errorf("option %d leaves %q in:\n%s", opts.skip, opts.word, got)
			}
		}
	})
}

func TestBuildRefuses(t *testing.T) {
	for _, text := range []string{
		"dir", "dir ..", "dir /abs", "thing a", "file a 99", "file a nonsense=1", `file a "open`, "file a mtime=x", "char a x:1",
		"file a\nfile a",
	} {
		f := &fakeT{TB: t}
		f.run(func(tb testing.TB) { Build(tb, t.TempDir(), text) })
		if len(f.errors) != 1 {
			t.Errorf("Build(%q): errors %q", text, f.errors)
		}
	}
}

func TestTreeDeep(t *testing.T) {
	dir := t.TempDir()
	const depth = 1200
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range depth {
		if err := unix.Mkdirat(fd, "deep", 0o755); err != nil {
			t.Fatal(err)
		}
		sub, err := unix.Openat(fd, "deep", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		if err != nil {
			t.Fatal(err)
		}
		fd = sub
	}
	unix.Close(fd)
	if got := strings.Count(Tree(t, dir), "\n"); got != depth+1 {
		t.Errorf("%d lines, want %d", got, depth+1)
	}
}

func TestMount(t *testing.T) {
	NoLeaks(t)
	EachFS(t, func(t *testing.T, dir string) {
		at := func(name string) string { return filepath.Join(dir, name) }
		Build(t, at("low:er,1"), "file a \"lower\"\nfile gone \"x\"")
		o := Mount(t, []string{at("low:er,1")}, at("upper"), at("work"), at("merged"))
		if err := os.Remove(filepath.Join(o.Merged, "gone")); err != nil {
			t.Fatal(err)
		}
		if got := Tree(t, o.Merged, NoTimes, NoRoot); strings.Count(got, "\n") != 1 {
			t.Errorf("merged:\n%s", got)
		}
		o.Unmount()
		o.Unmount()
		if got := Tree(t, at("upper"), NoTimes, NoRoot); got != "\"gone\" char 0000 0:0 0:0\n" {
			t.Errorf("upper: %s", got)
		}
	})
}

// TestContributing is the example in CONTRIBUTING.md.
func TestContributing(t *testing.T) {
	NoLeaks(t)
	EachFS(t, func(t *testing.T, dir string) {
		lower, upper := filepath.Join(dir, "lower"), filepath.Join(dir, "upper")
		Build(t, lower, `
			dir  etc 0700 uid=1 gid=2
			file etc/motd "hello\n"
			file etc/kept "x" user.a="1"
		`)
		Build(t, upper, `whiteout etc/motd`)
		o := Mount(t, []string{lower}, upper, filepath.Join(dir, "work"), filepath.Join(dir, "merged"))
		Compare(t, `"etc" dir 0755 0:0
"etc/kept" file 0644 0:0 size=1 sha256=2d711642b726b044 user.a="1"
`, Tree(t, o.Merged, NoRoot, NoTimes))
	})
}
