package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"golang.org/x/sys/unix"
)

// after returns the number that the store will give to the next snapshot.
func after(t testing.TB, s *Snapshotter) string {
	t.Helper()
	errUndo := errors.New("undo")
	var id string
	if err := s.tx(context.Background(), true, func(ctx context.Context) error {
		made, err := storage.CreateSnapshot(ctx, snapshots.KindActive, "probe", "")
		must(t, err)
		id = made.ID
		return errUndo
	}); !errors.Is(err, errUndo) {
		t.Fatal(err)
	}
	return id
}

// meanwhile is a context that calls f once, when somebody first selects on whether it is done: in the midst of a call that
// reads files.
type meanwhile struct {
	context.Context
	f *func()
}

func during(f func()) context.Context { return meanwhile{context.Background(), &f} }

func (m meanwhile) Done() <-chan struct{} {
	if f := *m.f; f != nil {
		*m.f = nil
		f()
	}
	return m.Context.Done()
}

// atLog is a log that calls f once, when a message is logged.
type atLog struct {
	slog.Handler
	message string
	f       func()
}

func (h *atLog) Enabled(context.Context, slog.Level) bool { return true }

func (h *atLog) Handle(_ context.Context, r slog.Record) error {
	if f := h.f; f != nil && r.Message == h.message {
		h.f = nil
		f()
	}
	return nil
}

// idOf returns the number of a snapshot.
func idOf(t testing.TB, s *Snapshotter, key string) (id string) {
	t.Helper()
	must(t, s.tx(context.Background(), false, func(ctx context.Context) (err error) {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	}))
	return id
}

// option returns the value of a mount's option.
func option(t testing.TB, m mount.Mount, prefix string) string {
	t.Helper()
	for _, o := range m.Options {
		if value, ok := strings.CutPrefix(o, prefix); ok {
			return value
		}
	}
	t.Fatalf("no %s in %v", prefix, m)
	return ""
}

func whiteout(t testing.TB, path string) {
	t.Helper()
	must(t, unix.Mknod(path, unix.S_IFCHR, 0))
}

// overwrite fills a file with what is no page of a store, from an offset on.
func overwrite(t testing.TB, path string, from int, n int) {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	for i := from; i < len(data) && (n < 0 || i < from+n); i++ {
		data[i] = byte(i*7 + i>>8)
	}
	must(t, os.WriteFile(path, data, 0o600))
}

// files lists all below root but the lock, with sizes.
func files(t testing.TB, root string) string {
	t.Helper()
	var b strings.Builder
	must(t, filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == filepath.Join(root, lockName) {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		size := info.Size()
		if e.IsDir() {
			size = 0
		}
		fmt.Fprintln(&b, path, info.Mode(), size)
		return nil
	}))
	return b.String()
}
