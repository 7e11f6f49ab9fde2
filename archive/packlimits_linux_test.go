package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// What Unpack would refuse Pack does not write: names of more than 64 KiB.
func TestPackLongNames(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	at := mustOpen(t, base)
	const name = 255
	depth := maxName / (name + 1) // the path of the last one is as long as it may be
	for range depth {
		must(t, unix.Mkdirat(at, strings.Repeat("d", name), 0o755))
		next, err := unix.Openat(at, strings.Repeat("d", name), unix.O_DIRECTORY, 0)
		must(t, errors.Join(err, unix.Close(at)))
		at = next
	}
	defer func() { must(t, unix.Close(at)) }()
	packs := func(what string) {
		t.Helper()
		to := filepath.Join(t.TempDir(), "to")
		must(t, os.Mkdir(to, 0o755))
		_, err := Unpack(context.Background(), to, bytes.NewReader(packed(t, base, PackOptions{})), UnpackOptions{})
		if err != nil {
			t.Errorf("%s: %.40s ... %v", what, err, errors.Unwrap(err))
		}
		must(t, os.RemoveAll(to))
	}
	packs("64 KiB")
	fails := func(what string) {
		t.Helper()
		r, err := Pack(context.Background(), base, PackOptions{})
		must(t, err)
		_, err = io.Copy(io.Discard, r)
		must(t, r.Close())
		if e := (*EntryError)(nil); !errors.Is(err, unix.ENAMETOOLONG) || !errors.As(err, &e) {
			t.Errorf("%s: %v", what, err)
		}
	}
	must(t, unix.Mknodat(at, "w", unix.S_IFCHR, 0))
	fails("whiteout")
	must(t, unix.Unlinkat(at, "w", 0))
	must(t, unix.Mkfifoat(at, "p", 0o644))
	fails("fifo")
	must(t, unix.Unlinkat(at, "p", 0))
	must(t, unix.Fsetxattr(at, "trusted.overlay.opaque", []byte("y"), 0))
	fails("opaque")
	must(t, unix.Fremovexattr(at, "trusted.overlay.opaque"))
	packs("64 KiB again")
}

// Nor xattrs of more than 1 MiB in one entry, or more than 4,096 of them.
func TestPackManyXattrs(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	for _, c := range []struct {
		n, size int
		fits    bool
	}{{17, 60 << 10, true}, {18, 60 << 10, false}, {maxXattrs, 1, true}, {maxXattrs + 1, 1, false}} {
		base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
		dir, to := filepath.Join(base, "d"), filepath.Join(base, "to")
		overlaytest.Build(t, dir, "file f")
		for i := range c.n {
			must(t, unix.Lsetxattr(filepath.Join(dir, "f"), fmt.Sprintf("user.%x", i), bytes.Repeat([]byte("v"), c.size), 0))
		}
		if !c.fits {
			if err := packErr(t, dir, "f", PackOptions{}); !errors.Is(err, unix.E2BIG) {
				t.Errorf("%+v: %v", c, err)
			}
			continue
		}
		unpackInto(t, to, packed(t, dir, PackOptions{}), UnpackOptions{})
		overlaytest.Compare(t, overlaytest.Tree(t, dir, overlaytest.NoRoot), overlaytest.Tree(t, to, overlaytest.NoRoot))
	}
}
