package sys

import "testing"

func TestParseMount(t *testing.T) {
	for _, c := range []struct {
		line, point string
		shared, ok  bool
	}{
		{"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n", "/mnt2", false, true},
		{"36 35 98:0 / / rw shared:12 master:1 - ext3 /dev/root rw\n", "/", true, true},
		{`36 35 98:0 / /a\040b\134c rw - ext3 shared:1 rw`, `/a b\c`, false, true},
		{"36 35 98:0 / /x", "", false, false},
		{"", "", false, false},
	} {
		point, shared, ok := parseMount(c.line)
		if point != c.point || shared != c.shared || ok != c.ok {
			t.Errorf("%q: got %q, %v, %v", c.line, point, shared, ok)
		}
	}
}

func TestHolds(t *testing.T) {
	for _, c := range []struct {
		dir, path string
		want      bool
	}{{"/", "/a", true}, {"/", "/", true}, {"/a", "/a", true}, {"/a", "/a/b", true}, {"/a", "/ab", false}, {"/a/b", "/a", false}} {
		if got := holds(c.dir, c.path); got != c.want {
			t.Errorf("holds(%q, %q) is %v", c.dir, c.path, got)
		}
	}
}
