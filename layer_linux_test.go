package overlay2

import (
	"errors"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/linkid"
)

// sizeName names a layer or a subtest by a number.
func sizeName(n int) string { return strconv.Itoa(n) }

// badIDs are refused by every call.
var badIDs = []string{"", ".", "..", "/", "a/b", "../evil", "/etc", "a\x00b", "l", "staging", "diff", "work", "merged",
	"link", "lower", "committed", "incomplete", "digests", "backingFsBlockDev", strings.Repeat("x", 256)}

func TestCheckID(t *testing.T) {
	for _, id := range badIDs {
		if err := checkID(id); !errors.Is(err, ErrInvalidID) {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, id := range []string{"a", "...", ".x", "a b", "a,b:c\\d", "-", "7sn2ok3mfgvhkl31nyqtxhzqp", "sha256:abc",
		"abc-init", "\xff", "a\nb", strings.Repeat("x", 255)} {
		if err := checkID(id); err != nil {
			t.Errorf("%q: %v", id, err)
		}
	}
}

const linkA, linkB = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "234567234567234567ABCDEFGH"

func TestLower(t *testing.T) {
	for _, links := range [][]string{{linkA}, {linkA, linkB}} {
		text := encodeLower(links)
		got, err := parseLower(text)
		if err != nil || !slices.Equal(got, links) {
			t.Errorf("%q: %q %v", text, got, err)
		}
	}
	if got := encodeLower([]string{linkA, linkB}); got != "l/"+linkA+":l/"+linkB {
		t.Errorf("encoded %q", got)
	}
	for name, text := range map[string]string{
		"empty":            "",
		"empty element":    "l/" + linkA + "::l/" + linkB,
		"ends in a colon":  "l/" + linkA + ":",
		"newline":          "l/" + linkA + "\n",
		"absolute":         "/etc",
		"dot dot":          "l/../../../../../../../etc",
		"dot dot element":  "..",
		"no l":             linkA,
		"short":            "l/" + linkA[1:],
		"long":             "l/" + linkA + "A",
		"lower case":       "l/" + strings.ToLower(linkA),
		"another root":     "x/" + linkA,
		"option smuggled":  "l/" + linkA + ",upperdir=/etc",
		"too many":         encodeLower(slices.Repeat([]string{linkA}, maxLowers+1)),
		"escaped colon":    `l/` + linkA + `\:l/` + linkB,
		"NUL":              "l/" + linkA + "\x00",
		"base32's no-gos0": "l/" + linkA[:25] + "0",
	} {
		if got, err := parseLower(text); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
}

func FuzzLower(f *testing.F) {
	f.Add("l/" + linkA + ":l/" + linkB)
	f.Add("")
	f.Add("l/../x:/etc")
	f.Fuzz(func(t *testing.T, s string) {
		links, err := parseLower(s)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("error %v", err)
			}
			return
		}
		if encodeLower(links) != s {
			t.Errorf("%q is read as %q", s, links)
		}
		for _, l := range links {
			if !linkid.Valid(l) {
				t.Errorf("link %q", l)
			}
		}
	})
}

func TestLinkTarget(t *testing.T) {
	for _, id := range []string{"a", "a b", "...", strings.Repeat("x", 255)} {
		if got, err := parseLinkTarget(linkTarget(id)); err != nil || got != id {
			t.Errorf("%q: %q %v", id, got, err)
		}
	}
	for _, target := range []string{"", "..", "../", "../diff", "..//diff", "../../diff", "../a/b/diff", "/a/diff", "a/diff",
		"../a/diff/", "../a/work", "../l/diff", "../staging/diff", "../a"} {
		if got, err := parseLinkTarget(target); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%q: %q %v", target, got, err)
		}
	}
}

func TestErrors(t *testing.T) {
	err := layerErr("create", "a", layerErr("create", "a", ErrLayerExists))
	if err.Error() != "create a: layer exists" || !errors.Is(err, fs.ErrExist) || !errors.Is(err, ErrLayerExists) {
		t.Error(err)
	}
	if err := layerErr("get", "a\nb", ErrLayerNotFound); err.Error() != `get "a\nb": layer not found` || !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if layerErr("get", "a", nil) != nil {
		t.Error("nil became an error")
	}
	var n interface{ NotSupported() }
	for _, err := range []error{ErrNotSupported, ErrIncompatibleFS, unsupported("x")} {
		if !errors.As(err, &n) || !errors.Is(err, ErrNotSupported) || !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%v is not as moby expects", err)
		}
	}
	if errors.Is(ErrNotSupported, ErrIncompatibleFS) {
		t.Error("every ErrNotSupported is ErrIncompatibleFS")
	}
}
