package overlay2

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// TestCheck: each kind of damage is found, under the name of its file, and nothing else.
func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(t *testing.T, home string)
		want   []string // paths, in order
	}{
		"nothing":         {func(*testing.T, string) {}, nil},
		"link missing":    {func(t *testing.T, home string) { must(t, os.Remove(home+"/mid/link")) }, []string{"l/MID", "mid/link", "top/lower"}},
		"l entry missing": {func(t *testing.T, home string) { must(t, os.Remove(linkPath(t, home, "mid"))) }, []string{"mid/link"}},
		"l entry wrong":   {func(t *testing.T, home string) { replaceLink(t, home, "mid", "../base/diff") }, []string{"l/MID", "mid/link"}},
		"l entry odd":     {func(t *testing.T, home string) { write(t, home+"/l/odd", "") }, []string{"l/odd"}},
		"l entry dangling": {func(t *testing.T, home string) { must(t, os.Symlink("../none/diff", home+"/l/"+linkA)) },
			[]string{"l/" + linkA}},
		"lower empty":       {func(t *testing.T, home string) { write(t, home+"/top/lower", "") }, []string{"top/lower"}},
		"lower too short":   {func(t *testing.T, home string) { cutLower(t, home, "top") }, []string{"top/lower"}},
		"diff missing":      {func(t *testing.T, home string) { must(t, os.Remove(home+"/mid/diff")) }, []string{"mid/diff"}},
		"work missing":      {func(t *testing.T, home string) { must(t, os.Remove(home+"/top/work")) }, []string{"top/work"}},
		"committed missing": {func(t *testing.T, home string) { must(t, os.Remove(home+"/mid/committed")) }, []string{"mid/committed"}},
		"merged stale":      {func(t *testing.T, home string) { must(t, os.Mkdir(home+"/top/merged", 0o700)) }, []string{"top/merged"}},
		"incomplete":        {func(t *testing.T, home string) { write(t, home+"/top/incomplete", "empty\n") }, []string{"top/incomplete"}},
		"stray file":        {func(t *testing.T, home string) { write(t, home+"/stray", "") }, []string{"stray"}},
		"stray fifo":        {func(t *testing.T, home string) { must(t, unix.Mkfifo(home+"/stray", 0o600)) }, []string{"stray"}},
		"staging leftover":  {func(t *testing.T, home string) { must(t, os.Mkdir(home+"/staging/new-X", 0o700)) }, []string{"staging/new-X"}},
		"base gone":         {func(t *testing.T, home string) { must(t, os.RemoveAll(home+"/base")) }, []string{"l/BASE", "mid/lower", "top/lower"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newTestDriver(t, t.TempDir(), Options{})
			must(t, d.Create("base", "", nil))
			must(t, d.Create("mid", "base", nil))
			must(t, d.CreateReadWrite("top", "mid", nil))
			names := strings.NewReplacer("MID", strings.TrimPrefix(linkPath(t, d.home, "mid"), d.home+"/l/"),
				"BASE", strings.TrimPrefix(linkPath(t, d.home, "base"), d.home+"/l/"))
			c.damage(t, d.home)
			problems, err := d.Check()
			must(t, err)
			var got []string
			for _, p := range problems {
				got = append(got, p.Path)
				if p.Err == nil || p.String() == "" {
					t.Errorf("problem without a text: %+v", p)
				}
			}
			if want := names.Replace(strings.Join(c.want, " ")); strings.Join(got, " ") != want {
				t.Errorf("problems %v\nwant %s", problems, want)
			}
			// The next test's Check must be empty.
			must(t, os.RemoveAll(d.home))
			must(t, os.MkdirAll(d.home+"/l", 0o700))
		})
	}
}

// cutLower leaves only the parent in a layer's chain.
func cutLower(t *testing.T, home, id string) {
	t.Helper()
	data, err := os.ReadFile(home + "/" + id + "/lower")
	must(t, err)
	first, _, _ := strings.Cut(string(data), ":")
	write(t, home+"/"+id+"/lower", first)
}

// TestCheckUnread: what could not be read is an error of Check and Repair, whatever else is wrong and read again meanwhile; but what
// was read again well is none.
func TestCheckUnread(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.Create("other", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	must(t, os.Chmod(d.home+"/other", 0o777)) // a problem, for which the layer is read again
	for path, kept := range map[string]bool{"base/children": true, "base": true, ".": true, "l/" + linkA: true, "other/children": false, "other": false} {
		h, err := readHome(d.home)
		must(t, err)
		h.note(path, unix.EIO) // as if it could not be read
		problems, err := h.settle()
		if len(problems) != 1 || errors.Is(err, unix.EIO) != kept || err != nil && !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v %v", path, problems, err)
		}
		h.close()
	}
	must(t, os.Chmod(d.home+"/other", 0o710))
}

// TestCheckCopied: that two layers have one link is reported, of the same one each time.
func TestCheckCopied(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	home := filepath.Join(t.TempDir(), "home")
	d, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	must(t, d.Create("base", "", nil))
	overlaytest.CopyTree(t, home+"/base", home+"/copy")
	for range 12 {
		problems, err := d.Check()
		must(t, err)
		if got := fmt.Sprint(problems); !strings.Contains(got, "copy/link: layer is corrupt: layer base has the same link ") {
			t.Error(got)
		}
	}
	must(t, d.Cleanup())
}
