package archive

import (
	"context"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// The choice of xattrs, and the count of what is left out.
func TestPackXattrChoice(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	dir := filepath.Join(base, "d")
	overlaytest.Build(t, dir, `file f user.a=1 trusted.b=2 security.other=3 trusted.overlay.origin=x trusted.overlay.overlay.c=4 user.overlay.opaque=y`)
	for _, c := range []struct {
		choice Xattrs
		want   string
		lost   int64
	}{
		{AllXattrs, `f 0 644 0:0 trusted.b="2" trusted.overlay.c="4" user.a="1"`, 1},
		{PortableXattrs, `f 0 644 0:0 user.a="1"`, 3},
	} {
		r, err := Pack(context.Background(), dir, PackOptions{Xattrs: c.choice})
		must(t, err)
		b, err := io.ReadAll(r)
		must(t, err)
		if got := strings.TrimSpace(listed(t, b)); got != c.want {
			t.Errorf("choice %d: got %s, want %s", c.choice, got, c.want)
		}
		if got := r.Stats().SkippedXattrs; got != c.lost {
			t.Errorf("choice %d: %d left out, want %d", c.choice, got, c.lost)
		}
		must(t, r.Close())
	}
}

// An xattr that a container sets by a name of overlayfs's own, as another overlay in it would, is
// the same in the native and the merged diff (Linux 6.7 stores it escaped).
func TestPackXattrSetThroughMount(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs", "overlay")
	base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	path := func(name string) string { return filepath.Join(base, name) }
	overlaytest.Build(t, path("low"), "dir d\nfile a")
	o := overlaytest.Mount(t, []string{path("low")}, path("up"), path("work"), path("m"))
	if err := unix.Setxattr(path("m/d"), "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		t.Logf("this kernel has no escaped xattrs: %v", err)
		return
	}
	changes, err := Compare(context.Background(), path("m"), path("low"))
	must(t, err)
	merged := listed(t, packed(t, path("m"), PackOptions{Format: Merged, Changes: changes}))
	o.Unmount()
	native := listed(t, packed(t, path("up"), PackOptions{Lowers: []string{path("low")}}))
	const want = "d/ 5 755 0:0 trusted.overlay.opaque=\"y\"\n"
	if native != want || merged != want {
		t.Errorf("native:\n%smerged:\n%swant:\n%s", native, merged, want)
	}
	c, err := Changes(context.Background(), path("up"), ReadOptions{Lowers: []string{path("low")}})
	must(t, err)
	if changeText(c) != "C /d\n" || changeText(changes) != "C /d\n" {
		t.Errorf("changes: %v, merged %v", c, changes)
	}
}

func TestMapXattrsBack(t *testing.T) {
	m := IDMap{UIDs: []IDRange{{0, 1000, 10}}, GIDs: []IDRange{{0, 2000, 10}}}
	acl := "\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xea\x03\x00\x00" + "\x08\x00\x04\x00\xd3\x07\x00\x00"
	back := "\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\x02\x00\x00\x00" + "\x08\x00\x04\x00\x03\x00\x00\x00"
	got, err := packACL(acl, m)
	must(t, err)
	if got != back {
		t.Errorf("got %q", got)
	}
	if again, err := m.mapACL(got); err != nil || again != acl {
		t.Errorf("and there again: %q, %v", again, err)
	}
	if _, err := packACL(acl, IDMap{UIDs: []IDRange{{0, 1, 2}}}); err == nil {
		t.Error("unmapped user is no error")
	}
	if _, err := packACL("\x02\x00\x00\x00x", m); err == nil {
		t.Error("half an entry is no error")
	}
}
