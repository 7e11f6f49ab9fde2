package sys

import (
	"os"
	"testing"
)

func TestParseMount(t *testing.T) {
	for _, c := range []struct {
		line string
		want MountPoint
		ok   bool
	}{
		{"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n", MountPoint{36, 35, "98:0", "/mnt1", "/mnt2", false}, true},
		{"36 35 98:0 / / rw shared:12 master:1 - ext3 /dev/root rw\n", MountPoint{36, 35, "98:0", "/", "/", true}, true},
		{`36 35 98:0 /c\040 /a\040b\134c rw - ext3 shared:1 rw`, MountPoint{36, 35, "98:0", "/c ", `/a b\c`, false}, true},
		{"x 35 98:0 / / rw - ext3 /dev/root rw\n", MountPoint{}, false},
		{"36 35 98:0 / /x", MountPoint{}, false},
		{"", MountPoint{}, false},
	} {
		m, ok := parseMount(c.line)
		if ok != c.ok || ok && m != c.want {
			t.Errorf("%q: got %+v, %v", c.line, m, ok)
		}
	}
}

// TestMountID: the mount that a descriptor was opened on is found among all.
func TestMountID(t *testing.T) {
	f, err := os.Open("/proc/self")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	id, err := MountID(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	m, ok, err := FindMount(id)
	if err != nil || !ok || m.Path != "/proc" || m.Root != "/" {
		t.Errorf("%d is %+v %v %v", id, m, ok, err)
	}
	if _, ok, err := FindMount(-1); ok || err != nil {
		t.Errorf("-1: %v %v", ok, err)
	}
}

func TestBinds(t *testing.T) {
	for _, c := range []struct {
		m, below MountPoint
		want     bool
	}{
		{MountPoint{Device: "8:1", Root: "/var/home", Path: "/var/home"}, MountPoint{Device: "8:1", Root: "/", Path: "/"}, true},
		{MountPoint{Device: "8:1", Root: "/@/home", Path: "/var/home"}, MountPoint{Device: "8:1", Root: "/@", Path: "/var"}, true},
		{MountPoint{Device: "8:1", Root: "/home", Path: "/var/home"}, MountPoint{Device: "8:1", Root: "/", Path: "/"}, false},
		{MountPoint{Device: "8:2", Root: "/var/home", Path: "/var/home"}, MountPoint{Device: "8:1", Root: "/", Path: "/"}, false},
		{MountPoint{Device: "8:1", Root: "/", Path: "/var/home"}, MountPoint{Device: "8:1", Root: "/", Path: "/"}, false},
	} {
		if got := c.m.Binds(c.below); got != c.want {
			t.Errorf("%+v over %+v: %v", c.m, c.below, got)
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
