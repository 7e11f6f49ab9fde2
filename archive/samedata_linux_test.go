package archive

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// TestCompareHoles: holes cost nothing, and are zeros where the other file has data.
func TestCompareHoles(t *testing.T) {
	zeros := `"` + strings.Repeat(`\x00`, 5000) + `"`
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		overlaytest.NoLeaks(t)
		for name, c := range map[string]struct{ old, new, want string }{
			"nothing but holes":        {"file f size=1T", "file f size=1T", ""},
			"data between holes":       {"file f size=1T data=512G:x data=700G:y", "file f size=1T data=512G:x data=700G:y", ""},
			"data at the end":          {"file f size=1T data=1099511627775:x", "file f size=1T data=1099511627775:x", ""},
			"other data":               {"file f size=1T data=512G:x data=700G:y", "file f size=1T data=512G:x data=700G:z", "C /f\n"},
			"other data at the end":    {"file f size=1T data=1099511627775:x", "file f size=1T data=1099511627775:y", "C /f\n"},
			"data elsewhere":           {"file f size=1T data=512G:x", "file f size=1T data=513G:x", "C /f\n"},
			"data in the one":          {"file f size=1T", "file f size=1T data=1000G:x", "C /f\n"},
			"data in the other":        {"file f size=1T data=1000G:x", "file f size=1T", "C /f\n"},
			"zeros for a hole":         {"file f size=1T data=1000G:" + zeros, "file f size=1T", ""},
			"a hole for zeros":         {"file f size=1T data=512G:x", "file f size=1T data=0:" + zeros + " data=512G:x data=1000G:" + zeros, ""},
			"zeros and then data":      {"file f size=1T", "file f size=1T data=1000G:" + zeros + " data=1001G:x", "C /f\n"},
			"longer data in the one":   {"file f size=1T data=0:x", "file f size=1T data=0:x data=4K:" + zeros, ""},
			"longer, and not zero":     {"file f size=1T data=0:x", "file f size=1T data=0:x data=8K:y", "C /f\n"},
			"no hole (many at a time)": {"file f size=600K data=0:" + zeros + " data=599K:x", "file f size=600K data=599K:y", "C /f\n"},
		} {
			t.Run(name, func(t *testing.T) {
				old, now := filepath.Join(dir, name, "old"), filepath.Join(dir, name, "new")
				overlaytest.Build(t, old, c.old)
				overlaytest.Build(t, now, c.new)
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // to read them takes hours
				defer cancel()
				changes, err := Compare(ctx, now, old)
				if got := changeText(changes); err != nil || got != c.want {
					t.Errorf("Compare: %q, want %q, %v", got, c.want, err)
				}
				changes, err = Changes(ctx, now, ReadOptions{Lowers: []string{old}})
				if got := changeText(changes); err != nil || got != c.want {
					t.Errorf("Changes: %q, want %q, %v", got, c.want, err)
				}
			})
		}
	})
}

// TestCompareFragments: a file of many small fragments is compared by reading these.
func TestCompareFragments(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	const fragments, apart = 2000, 1 << 30
	open := func(name string) int {
		fd, err := unix.Open(filepath.Join(base, name), unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
		must(t, err)
		t.Cleanup(func() { must(t, unix.Close(fd)) })
		for i := range int64(fragments) {
			_, err := unix.Pwrite(fd, []byte{byte(i)}, i*apart+i)
			must(t, err)
		}
		must(t, unix.Ftruncate(fd, fragments*apart))
		return fd
	}
	x, y := open("x"), open("y")
	read := 0
	c := comparer{stop: func() error { read++; return nil }}
	same, err := c.sameData(x, y, fragments*apart)
	if err != nil || !same || read > 2*fragments {
		t.Errorf("same %v after %d reads, %v", same, read, err)
	}
	_, err = unix.Pwrite(y, []byte{1}, (fragments-1)*apart)
	must(t, err)
	if same, err = c.sameData(x, y, fragments*apart); err != nil || same {
		t.Errorf("same %v, %v", same, err)
	}
}
