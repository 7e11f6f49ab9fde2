package archive

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// afterCancel returns how long f went on after its context was cancelled, at best of three: a machine that does
// much else may take longer.
func afterCancel(t *testing.T, delay time.Duration, f func(ctx context.Context) error) time.Duration {
	t.Helper()
	best := time.Hour
	for range 3 {
		ctx, cancel := context.WithCancel(context.Background())
		at := make(chan time.Time, 1)
		time.AfterFunc(delay, func() { at <- time.Now(); cancel() })
		err := f(ctx)
		ended := time.Now()
		cancel()
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("%v: it was done before it was cancelled, or has failed", err)
		}
		best = min(best, ended.Sub(<-at))
	}
	return best
}

// TestReadCancelQuickly cancels what reads in the midst of a large file and of a large directory.
func TestReadCancelQuickly(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	overlaytest.NoLeaks(t)
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs", Size: 2 << 30, Options: "nr_inodes=0"})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"new", "old", "many"} {
		must(os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	for _, d := range []string{"new", "old"} {
		name := filepath.Join(dir, d, "large")
		f, err := os.Create(name)
		must(err)
		if d == "old" { // the same as holes, but to be read
			for i := range int64(50_000) {
				_, err := f.WriteAt([]byte{0}, i<<24)
				must(err)
			}
		}
		must(f.Truncate(1 << 42))
		must(f.Close())
		must(os.Chtimes(name, time.Unix(1e9, 0), time.Unix(1e9, 0)))
	}
	for _, name := range overlaytest.Names(200_000) {
		must(unix.Mknod(filepath.Join(dir, "many", name), unix.S_IFREG|0o644, 0))
	}
	over := ReadOptions{Lowers: []string{filepath.Join(dir, "old")}}
	for name, c := range map[string]struct {
		delay time.Duration
		f     func(ctx context.Context) error
	}{
		"compare a file": {30 * time.Millisecond, func(ctx context.Context) error {
			_, err := Compare(ctx, filepath.Join(dir, "new"), filepath.Join(dir, "old"))
			return err
		}},
		"changes of a file": {30 * time.Millisecond, func(ctx context.Context) error {
			_, err := Changes(ctx, filepath.Join(dir, "new"), over)
			return err
		}},
		"pack a directory": {20 * time.Millisecond, func(ctx context.Context) error {
			r, err := Pack(ctx, filepath.Join(dir, "many"), PackOptions{})
			if err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, r)
			return errors.Join(err, r.Close())
		}},
		"changes of a directory": {20 * time.Millisecond, func(ctx context.Context) error {
			_, err := Changes(ctx, filepath.Join(dir, "many"), ReadOptions{})
			return err
		}},
		"usage of a directory": {20 * time.Millisecond, func(ctx context.Context) error {
			_, err := Usage(ctx, filepath.Join(dir, "many"))
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if took := afterCancel(t, c.delay, c.f); took > 100*time.Millisecond {
				t.Errorf("came back after %v", took)
			}
		})
	}
}
