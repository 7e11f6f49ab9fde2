package archive

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// FuzzUnpack unpacks whatever it is given, over a lower layer, into a plain directory and
// as a base layer, beside a canary tree. Nothing outside may change, nothing may hang, and
// what was unpacked must be a layer that Usage and Pack can read.
func FuzzUnpack(f *testing.F) {
	overlaytest.Require(f, "root")
	for _, stream := range caseTars(f) {
		if len(stream) < 5<<10 {
			f.Add(stream)
		}
	}
	top := f.TempDir()
	lower := filepath.Join(top, "lower")
	overlaytest.Build(f, top, "file secret \"keep\" user.canary=\"alive\"\ndir sub 0700\nfile sub/f \"x\"\nsymlink s -> root")
	overlaytest.Build(f, lower, "file x \"1\"\ndir d 0700 uid=3\nfile d/old \"1\"\nfile d/sub/old \"2\"\nsymlink l -> ../..\nfile a/b/c \"3\"\nwhiteout w")
	f.Fuzz(func(t *testing.T, stream []byte) {
		if len(stream) > 1<<16 {
			return
		}
		stream = fixChecksums(stream)
		watched(t, func() {
			for _, opts := range []UnpackOptions{{}, {Lowers: []string{lower}}, {Format: Merged}} {
				fuzzUnpack(t, top, stream, opts)
			}
		})
	})
}

// fuzzUnpack unpacks the stream into a new directory beside the canary tree.
func fuzzUnpack(t *testing.T, top string, stream []byte, opts UnpackOptions) {
	t.Helper()
	root := filepath.Join(top, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if opts.Format == Merged {
		overlaytest.Build(t, root, "file d/old \"1\"\nsymlink l -> ../..\nfile x \"1\"")
	}
	before := canary(t, top)
	var stats Stats
	var err error
	bounded(t, func() { stats, err = Unpack(context.Background(), root, bytes.NewReader(stream), opts) })
	if after := canary(t, top); after != before {
		t.Errorf("outside of the root:\n%s", overlaytest.Diff(before, after))
	}
	checkUnpacked(t, root, opts, stats, err)
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
}

// checkUnpacked looks at the result of one Unpack.
func checkUnpacked(t *testing.T, root string, opts UnpackOptions, stats Stats, err error) {
	t.Helper()
	if err != nil {
		var entry *EntryError
		if !errors.As(err, &entry) && !errors.Is(err, ErrFormat) && !errors.Is(err, ErrInvalidWhiteout) {
			t.Errorf("an error about nothing: %v", err)
		}
		if errors.Is(err, unix.EBADF) || errors.Is(err, ErrChanged) {
			t.Errorf("impossible error: %v", err)
		}
		return
	}
	if opts.Format == Merged {
		return
	}
	usage, err := Usage(context.Background(), root)
	if err != nil || usage.Size != stats.Size {
		t.Errorf("size %d, Usage %d, %v", stats.Size, usage.Size, err)
	}
	r, err := Pack(context.Background(), root, PackOptions{Lowers: opts.Lowers})
	if err != nil {
		t.Fatal(err)
	}
	// A hole may be of any size: its zeros are not read when it is packed as a hole, and no more of them are
	// looked at here than a fuzz test has time for.
	if _, err := io.Copy(io.Discard, io.LimitReader(r, 1<<22)); err != nil {
		t.Errorf("pack: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Errorf("pack: %v", err)
	}
}

// canary describes what lies beside the root: without the root itself.
func canary(t *testing.T, top string) string {
	t.Helper()
	hidden := filepath.Join(top, "root")
	aside := filepath.Join(filepath.Dir(top), "fuzz-root")
	if err := os.Rename(hidden, aside); err != nil {
		t.Fatal(err)
	}
	text := overlaytest.Tree(t, top, overlaytest.NoRootTime)
	if err := os.Rename(aside, hidden); err != nil {
		t.Fatal(err)
	}
	return text
}
