package archive

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpenFile(t *testing.T) {
	layers, _ := layerDirs(t, 2)
	top, low := layers[0], layers[1]
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, []byte("secret"), 0o600))
	must(t, os.MkdirAll(filepath.Join(top, "usr/lib"), 0o755))
	must(t, os.MkdirAll(filepath.Join(low, "usr/lib"), 0o755))
	must(t, os.WriteFile(filepath.Join(top, "usr/lib/f"), []byte("top"), 0o644))
	must(t, os.WriteFile(filepath.Join(low, "usr/lib/g"), []byte("low"), 0o644))
	must(t, os.WriteFile(filepath.Join(low, "usr/lib/w"), []byte("low"), 0o644))
	must(t, unix.Mknod(filepath.Join(top, "usr/lib/w"), unix.S_IFCHR, 0))
	must(t, os.Symlink("usr/lib", filepath.Join(low, "lib")))
	must(t, os.Symlink("/../../usr/./lib", filepath.Join(top, "abs")))
	must(t, os.Symlink("loop", filepath.Join(top, "loop")))
	must(t, os.Symlink("../../../../../../../../../.."+filepath.Dir(secret), filepath.Join(top, "out")))
	must(t, os.Symlink(secret, filepath.Join(top, "leaf")))
	must(t, unix.Mkfifo(filepath.Join(top, "fifo"), 0o644))
	for _, c := range []struct {
		name, want string
		err        error
	}{
		{"usr/lib/f", "top", nil},
		{"./usr/lib/f", "top", nil},
		{"/usr/lib/f", "top", nil},
		{"usr/lib/g", "low", nil},
		{"lib/f", "top", nil},
		{"abs/f", "top", nil},
		{"../usr/lib/../../abs/g", "low", nil},
		{"usr/lib/w", "", fs.ErrNotExist},
		{"none", "", fs.ErrNotExist},
		{"out/secret", "", fs.ErrNotExist},
		{"leaf", "", unix.ELOOP},
		{"loop/x", "", unix.ELOOP},
		{"usr/lib/f/x", "", unix.ENOTDIR},
		{"fifo", "", fs.ErrNotExist},
		{"usr", "", fs.ErrNotExist},
		{"usr/", "", fs.ErrNotExist},
		{"..", "", unix.EISDIR},
		{"", "", fs.ErrNotExist},
		{"a\x00b", "", unix.EINVAL},
	} {
		r, err := OpenFile(top, c.name, ReadOptions{Lowers: []string{low}})
		if c.err != nil {
			var e *EntryError
			if !errors.Is(err, c.err) || !errors.As(err, &e) || e.Op != "open" {
				t.Errorf("%q: %v, want %v", c.name, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", c.name, err)
			continue
		}
		b, err := io.ReadAll(r)
		must(t, err)
		must(t, r.Close())
		if string(b) != c.want {
			t.Errorf("%q: %q, want %q", c.name, b, c.want)
		}
	}
}
