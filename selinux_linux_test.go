package overlay2

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// TestSELinuxLabel: all in the mount has the label that Get is given, files below and new ones,
// and none of it gets into a diff.
func TestSELinuxLabel(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "selinux")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		const label = "system_u:object_r:container_file_t:s0:c1,c2"
		d := newTestDriver(t, dir, Options{})
		apply(t, d, "base", "", makeTar(t, file("below", "1"), file("dir/", "")))
		must(t, d.CreateReadWrite("box", "base", &CreateOpts{MountLabel: label}))
		path, err := d.Get("box", label)
		must(t, err)
		must(t, os.WriteFile(path+"/dir/new", []byte("2"), 0o600))
		must(t, os.Chmod(path+"/below", 0o600))
		for _, name := range []string{"", "/below", "/dir", "/dir/new"} {
			got := make([]byte, 256)
			n, err := unix.Lgetxattr(path+name, "security.selinux", got)
			must(t, err)
			if s := strings.TrimRight(string(got[:n]), "\x00"); s != label {
				t.Errorf("%q has label %q", name, s)
			}
		}
		must(t, d.Put("box"))
		r := tar.NewReader(bytes.NewReader(readDiff(t, d, "box", "base")))
		for {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			must(t, err)
			for record := range h.PAXRecords {
				if strings.Contains(record, "security.selinux") {
					t.Errorf("%s: %s in the diff", h.Name, record)
				}
			}
		}
	})
}

// TestSELinuxBadLabel: the kernel's refusal comes out, and nothing is mounted.
func TestSELinuxBadLabel(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "selinux")
	d := newTestDriver(t, t.TempDir(), Options{})
	apply(t, d, "base", "", makeTar(t, file("below", "1")))
	must(t, d.CreateReadWrite("box", "base", nil))
	_, err := d.Get("box", "system_u:object_r:no_such_t:s0")
	wantErr(t, err, unix.EINVAL)
	if mounted, err := os.ReadDir(d.home + "/box/merged"); !errors.Is(err, os.ErrNotExist) && len(mounted) > 0 {
		t.Errorf("mounted: %v %v", mounted, err)
	}
	wantErr(t, d.Put("box"), ErrNotMounted)
}
