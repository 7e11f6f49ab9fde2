package archive

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// layerDirs makes n empty layers, nearest first, and as many work directories.
func layerDirs(t *testing.T, n int) (layers []string, work string) {
	t.Helper()
	base, err := os.MkdirTemp("", "view") // t.TempDir keeps the commas of the test name
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(base)) })
	if err := unix.Mount("tmpfs", base, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	umount := func() {
		if err := unix.Unmount(base, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}
	// Before Linux 6.6 tmpfs has no user.* xattrs: then it is the filesystem below.
	if err := unix.Setxattr(base, "user.test", nil, 0); err == unix.EOPNOTSUPP {
		umount()
	} else {
		must(t, err)
		must(t, unix.Removexattr(base, "user.test"))
		t.Cleanup(umount)
	}
	for i := range n {
		dir := filepath.Join(base, fmt.Sprint("d", i))
		must(t, os.Mkdir(dir, 0o755))
		layers = append(layers, dir)
	}
	return layers, base
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mounted runs f in an overlay of layers[0] over the rest.
func mounted(t *testing.T, base string, layers []string, opts string, f func(dir string)) {
	t.Helper()
	work, merged := filepath.Join(base, "work"), filepath.Join(base, "merged")
	must(t, os.RemoveAll(work))
	must(t, os.MkdirAll(work, 0o755))
	must(t, os.MkdirAll(merged, 0o755))
	data := "upperdir=" + layers[0] + ",workdir=" + work + ",lowerdir=" + strings.Join(layers[1:], ":")
	if opts != "" {
		data += "," + opts
	}
	must(t, unix.Mount("overlay", merged, "overlay", 0, data))
	defer func() { must(t, unix.Unmount(merged, 0)) }()
	f(merged)
}

// scramble does random things to a tree, as a container would.
func scramble(t *testing.T, r *rand.Rand, dir string, steps int) {
	t.Helper()
	pick := func() string {
		p := dir
		for range 1 + r.IntN(3) {
			p = filepath.Join(p, fmt.Sprint("n", r.IntN(4)))
		}
		return p
	}
	for range steps {
		p, q := pick(), pick()
		// Many of these fail, for a path that isn't there or isn't right: that is fine.
		switch r.IntN(10) {
		case 0, 1:
			_ = os.MkdirAll(p, 0o755)
		case 2, 3:
			_ = os.WriteFile(p, []byte(fmt.Sprint(r.IntN(9), p)), 0o644)
		case 4:
			_ = os.RemoveAll(p)
		case 5, 6:
			_ = os.Rename(p, q)
		case 7:
			_ = os.Chmod(p, 0o700|os.FileMode(r.IntN(64)))
		case 8:
			_ = os.Link(p, q)
		case 9:
			_ = os.Symlink("n1/n2", p)
		}
	}
}

// shown lists a mounted tree as text: type, mode, size, content of each file.
func shown(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	must(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		content := ""
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			content = string(b)
		}
		out = append(out, line(path[len(dir):], &st, content))
		return nil
	}))
	slices.Sort(out)
	return out
}

func line(path string, st *unix.Stat_t, content string) string {
	size := st.Size
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		size = 0
	}
	return fmt.Sprintf("%s %o %d %q", path, st.Mode, size, content)
}

// viewed lists a merged view as shown does.
func viewed(t *testing.T, d *mergedDir, path string) []string {
	t.Helper()
	names, err := d.names()
	must(t, err)
	var out []string
	for _, name := range names {
		e, err := d.lookup(name)
		must(t, err)
		if !e.exists {
			t.Fatalf("%s/%s is listed but not found", path, name)
		}
		content := ""
		if e.st.Mode&unix.S_IFMT == unix.S_IFREG {
			fd, err := d.openData(name)
			must(t, err)
			f := os.NewFile(uintptr(fd), name)
			b := make([]byte, 1000)
			n, _ := f.Read(b)
			content = string(b[:max(n, 0)])
			must(t, f.Close())
		}
		out = append(out, line(path+"/"+name, &e.st, content))
		child, err := d.child(name)
		must(t, err)
		if (child != nil) != (e.st.Mode&unix.S_IFMT == unix.S_IFDIR) {
			t.Fatalf("%s/%s: mode %o, directory %v", path, name, e.st.Mode, child != nil)
		}
		if child != nil {
			out = append(out, viewed(t, child, path+"/"+name)...)
			child.close()
		}
	}
	if path == "" {
		slices.Sort(out)
	}
	return out
}

// The merged view is what the kernel shows, through renamed directories and files of
// which only the metadata was copied up.
func TestViewIsWhatTheKernelShows(t *testing.T) {
	for _, opts := range []string{"", "redirect_dir=on", "redirect_dir=on,metacopy=on", "userxattr"} {
		for seed := range uint64(12) {
			t.Run(fmt.Sprintf("%s/%d", opts, seed), func(t *testing.T) {
				const depth = 5
				layers, base := layerDirs(t, depth)
				r := rand.New(rand.NewPCG(seed, 1))
				scramble(t, r, layers[depth-1], 60)
				var want []string
				for top := depth - 2; top >= 0; top-- {
					mounted(t, base, layers[top:], opts, func(dir string) {
						scramble(t, r, dir, 40)
						want = shown(t, dir)
					})
				}
				f := OverlayTrusted
				if opts == "userxattr" {
					f = OverlayUser
				}
				d, err := openLowers(layers, f)
				must(t, err)
				defer d.close()
				got := viewed(t, d, "")
				if !slices.Equal(got, want) {
					t.Errorf("view:\n%s\nkernel:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
				}
			})
		}
	}
}

func unixTime(sec int) time.Time { return time.Unix(int64(sec), 0) }
