package archive

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// TestTornLinks: a file that is as before but has got another hard link, or lost one of those it had,
// is a change: a diff without it could not restore the group.
func TestTornLinks(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	dir := t.TempDir()
	overlaytest.Build(t, dir+"/lower", "file d/h1 \"x\"\nlink d/h2 -> d/h1\nfile alone \"y\"\nfile other \"z\"")
	o := overlaytest.Mount(t, []string{dir + "/lower"}, dir+"/upper", dir+"/work", dir+"/merged")
	for _, l := range [][2]string{{"d/h1", "h3"}, {"alone", "d/again"}} {
		if err := os.Link(o.Merged+"/"+l[0], o.Merged+"/"+l[1]); err != nil {
			t.Fatal(err)
		}
	}
	merged, err := Compare(t.Context(), o.Merged, dir+"/lower")
	if err != nil {
		t.Fatal(err)
	}
	o.Unmount()
	native, err := Changes(t.Context(), dir+"/upper", ReadOptions{Lowers: []string{dir + "/lower"}})
	if err != nil {
		t.Fatal(err)
	}
	want := "C /alone A /d/again C /d C /d/h1 A /h3"
	for name, changes := range map[string][]Change{"Compare": merged, "Changes": native} {
		got := strings.Trim(fmt.Sprint(changes), "[]")
		if !sameWords(got, want) {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

// sameWords compares lists of changes whatever their order.
func sameWords(a, b string) bool {
	count := map[string]int{}
	for _, s := range [][2]any{{a, 1}, {b, -1}} {
		words := strings.Fields(s[0].(string))
		for i := 0; i+1 < len(words); i += 2 {
			count[words[i]+words[i+1]] += s[1].(int)
		}
	}
	for _, n := range count {
		if n != 0 {
			return false
		}
	}
	return true
}
