package archive

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
)

// TestNameListInParts lists directories with room for few names at a time: all names come, once and in
// order.
func TestNameListInParts(t *testing.T) {
	overlaytest.NoLeaks(t)
	rng := rand.New(rand.NewPCG(3, 4))
	for _, n := range []int{0, 1, 3, 7, 8, 9, 64, 300} {
		dir := t.TempDir()
		want := make([]string, 0, n)
		for i := range n {
			// Many share their first eight bytes, or all of a shorter name.
			name := strings.Repeat("a", rng.IntN(12)) + fmt.Sprint(i)
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			want = append(want, name)
		}
		slices.Sort(want)
		for _, most := range []int{1, 4, 50, 0} {
			var w walk
			d, err := w.enter(mustOpen(t, dir))
			if err != nil {
				t.Fatal(err)
			}
			d.most = most
			if err := w.list(d, d.fd, true); err != nil {
				t.Fatal(err)
			}
			if d.total != n {
				t.Errorf("%d names, %d at a time: %d counted", n, most, d.total)
			}
			var got []string
			for {
				if err := w.more(d); err != nil {
					t.Fatal(err)
				}
				if held := len(d.names); most > 0 && held >= 2*most {
					t.Fatalf("holds %d names, with %d to hold", held, most)
				}
				peeked := d.peek()
				name, _ := d.take()
				if name == nil {
					break
				}
				if peeked.String() != name.String() {
					t.Errorf("peek says %s, take %s", peeked, name)
				}
				got = append(got, name.String())
			}
			if !slices.Equal(got, want) {
				t.Errorf("%d names, %d at a time: %q, want %q", n, most, got, want)
			}
			if err := w.pop(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestNameListStopped stops a listing in parts at each of its steps.
func TestNameListStopped(t *testing.T) {
	dir := t.TempDir()
	for _, name := range overlaytest.Names(2*stopEvery + 10) {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	enough := errors.New("enough")
	for most := range 3 {
		fd := mustOpen(t, dir)
		t.Cleanup(func() { _ = sys.Close(fd) })
		asked := 0
		list := nameList{most: most * stopEvery / 2}
		var dents sys.DirReader
		if err := list.read(&dents, fd, true, func() error { asked++; return nil }); err != nil {
			t.Fatal(err)
		}
		if asked < 2 {
			t.Errorf("asked %d times", asked)
		}
		for at := range asked {
			n := 0
			err := list.readOn(&dents, fd, func() error {
				if n++; n > at {
					return enough
				}
				return nil
			})
			if !errors.Is(err, enough) && n > at {
				t.Errorf("stopped at %d of %d: %v", at, asked, err)
			}
		}
	}
}

func mustOpen(t *testing.T, dir string) int {
	t.Helper()
	fd, err := sys.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}
