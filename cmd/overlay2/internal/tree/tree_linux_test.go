package tree

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func make2(t *testing.T) (a, b string) {
	t.Helper()
	when := time.Unix(1000, 5)
	var dirs [2]string
	for i := range dirs {
		d := t.TempDir()
		must(t, os.MkdirAll(filepath.Join(d, "d"), 0o755))
		must(t, os.WriteFile(filepath.Join(d, "d/f"), []byte("same"), 0o644))
		must(t, os.Link(filepath.Join(d, "d/f"), filepath.Join(d, "g")))
		must(t, os.WriteFile(filepath.Join(d, "h"), []byte("same"), 0o644))
		must(t, os.Symlink("x", filepath.Join(d, "l")))
		must(t, unix.Mkfifo(filepath.Join(d, "p"), 0o600))
		for _, n := range []string{"d/f", "d", "h", "p", "l"} {
			ts := unix.NsecToTimespec(when.UnixNano())
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(d, n), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
		}
		dirs[i] = d
	}
	return dirs[0], dirs[1]
}

// Each kind of difference is seen, and named.
func TestEveryDifference(t *testing.T) {
	keep := func(path string, f func() error) func() error { // but not the times
		return func() error {
			var st unix.Stat_t
			must(t, unix.Lstat(path, &st))
			err := f()
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW))
			return err
		}
	}
	for want, change := range map[string]func(d string) func() error{
		"": func(string) func() error { return func() error { return nil } },
		"content": func(d string) func() error {
			return keep(d+"/h", func() error { return os.WriteFile(d+"/h", []byte("SAME"), 0o644) })
		},
		"mode":  func(d string) func() error { return func() error { return unix.Chmod(d+"/h", 0o4644) } },
		"owner": func(d string) func() error { return func() error { return os.Lchown(d+"/l", -1, os.Getgid()+1) } },
		"mtime": func(d string) func() error {
			return func() error { return os.Chtimes(d+"/h", time.Time{}, time.Unix(1000, 6)) }
		},
		"target": func(d string) func() error {
			return func() error { must(t, os.Remove(d+"/l")); return os.Symlink("y", d+"/l") }
		},
		"hard links":     func(d string) func() error { return func() error { return os.Remove(d + "/g") } },
		"only in the se": func(d string) func() error { return func() error { return os.Mkdir(d+"/new", 0o755) } },
		"xattr user.x": func(d string) func() error {
			return func() error { return unix.Setxattr(d+"/h", "user.x", []byte{0}, 0) }
		},
		"type": func(d string) func() error {
			return func() error { must(t, os.Remove(d+"/p")); return os.Mkdir(d+"/p", 0o600) }
		},
	} {
		a, b := make2(t)
		if want == "owner" && os.Getuid() != 0 {
			continue // nothing to see without root
		}
		must(t, change(b)())
		x, _, err := Read(context.Background(), a)
		must(t, err)
		y, _, err := Read(context.Background(), b)
		must(t, err)
		got := strings.Join(Diff(x, y), "\n")
		if want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%q: got %q", want, got)
		}
	}
}
