package graphdriver

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/go-archive"
	"golang.org/x/sys/unix"
)

// TestDiffKeepsCapability: moby unpacks a Diff of a file with two names and a capability with that: after it has made
// the second name, it changes the owner, which takes the capability away.
func TestDiffKeepsCapability(t *testing.T) {
	d := open(t, t.TempDir())
	must(t, d.CreateReadWrite("box", "", nil))
	dir, err := d.Get("box", "")
	must(t, err)
	const attr = "security.capability"
	want := append([]byte{1, 0, 0, 2, 0, 0x20}, make([]byte, 14)...) // CAP_NET_RAW, version 2
	must(t, os.WriteFile(filepath.Join(dir, "ping"), []byte("x"), 0o755))
	must(t, unix.Lsetxattr(filepath.Join(dir, "ping"), attr, want, 0))
	must(t, os.Link(filepath.Join(dir, "ping"), filepath.Join(dir, "ping6")))
	must(t, d.Put("box"))
	diff, err := d.Diff("box", "")
	must(t, err)
	to := t.TempDir()
	_, err = archive.UnpackLayer(to, diff, &archive.TarOptions{})
	must(t, err)
	must(t, diff.Close())
	for _, name := range []string{"ping", "ping6"} {
		got := make([]byte, 64)
		n, err := unix.Lgetxattr(filepath.Join(to, name), attr, got)
		if err != nil || !bytes.Equal(got[:n], want) {
			t.Errorf("%s: %x, %v", name, got[:max(n, 0)], err)
		}
	}
	must(t, d.Remove("box"))
}
