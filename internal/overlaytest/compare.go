package overlaytest

import (
	"fmt"
	"strings"
	"testing"
)

// diffLimit is how many differing lines are worth reading.
const diffLimit = 60

// Compare fails the test when two texts, such as Tree returns, differ, and shows the
// lines that do: "-" for those only in want, "+" for those only in got.
func Compare(t testing.TB, want, got string) {
	t.Helper()
	if diff := Diff(want, got); diff != "" {
		t.Errorf("trees differ (-want +got):\n%s", diff)
	}
}

// Diff returns the lines that differ between two texts, "" when none does.
func Diff(want, got string) string {
	if want == got {
		return ""
	}
	var b strings.Builder
	n := 0
	line := func(sign, s string) {
		if n++; n <= diffLimit {
			fmt.Fprintf(&b, "%s %s\n", sign, s)
		}
	}
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for len(w) > 0 || len(g) > 0 {
		if len(w) > 0 && len(g) > 0 && w[0] == g[0] {
			w, g = w[1:], g[1:]
			continue
		}
		i, j := resync(w, g)
		for _, s := range w[:i] {
			line("-", s)
		}
		for _, s := range g[:j] {
			line("+", s)
		}
		w, g = w[i:], g[j:]
	}
	if n > diffLimit {
		fmt.Fprintf(&b, "... and %d lines more\n", n-diffLimit)
	}
	return b.String()
}

// resync returns how many lines of each side to give up until both have the same line
// again, as few in sum as it can find; all of them if they never do. Lines of a tree
// start with a path that occurs once, so a line found again is the same entry.
func resync(w, g []string) (int, int) {
	at := make(map[string]int, len(g))
	for j := len(g) - 1; j >= 0; j-- {
		at[g[j]] = j
	}
	bi, bj := len(w), len(g)
	for i := 0; i < len(w) && i < bi+bj; i++ {
		if j, ok := at[w[i]]; ok && i+j < bi+bj {
			bi, bj = i, j
		}
	}
	return bi, bj
}
