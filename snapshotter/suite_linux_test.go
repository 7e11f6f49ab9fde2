package snapshotter

import (
	"context"
	"log/slog"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testLog is a log whose warnings fail the test, as nothing that most tests do needs one.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Errorf("logged: %s", p)
	return len(p), nil
}

// TestSuite is containerd's own suite. Its name says that a directory of a lower layer cannot be renamed without
// redirect_dir, as with all overlays; with it, it can.
func TestSuite(t *testing.T) {
	overlaytest.Require(t, "root")
	for name, opts := range map[string]Options{"overlayfs": {}, "redirect": {MountOptions: []string{"redirect_dir=on"}}} {
		t.Run(name, func(t *testing.T) {
			testsuite.SnapshotterSuite(t, name, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				s, err := New(root, opts)
				if err != nil {
					return nil, nil, err
				}
				return s, func() error {
					problems, err := s.driver.Check()
					for _, p := range problems {
						t.Errorf("check: %v", p)
					}
					if err != nil {
						return err
					}
					return s.Close()
				}, nil
			})
		})
	}
}
