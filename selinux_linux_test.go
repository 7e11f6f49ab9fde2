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

// TestLabelSmuggling: whatever a label holds, with any way of mounting it adds no option: a label with
// what could end it is refused before the kernel sees it, in all calls that take one, and nothing is left mounted.
func TestLabelSmuggling(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	for _, method := range methods(t) {
		t.Run(method.String(), func(t *testing.T) {
			d := newTestDriver(t, t.TempDir(), Options{MountMethod: method})
			deepChain(t, d, 2)
			must(t, d.CreateReadWrite("box", "layer1", nil))
			for _, label := range []string{`u:r:t:s0",upperdir=/etc,x="`, `u:r:t:s0,upperdir=/etc`, `u:r:t:s0\`, "u:r:t:s0\n", "u:r:t:s0 x", `'u:r:t:s0'`, "a\x00b", `"`} {
				_, err := d.Get("box", label)
				wantErr(t, err, ErrInvalidOption)
				_, err = d.GetWith("box", MountOpts{Label: label, IDMap: mapAt(1)})
				wantErr(t, err, ErrInvalidOption)
				_, err = d.Mount("layer1", MountOpts{Label: label})
				wantErr(t, err, ErrInvalidOption)
				_, err = d.MountData("box", label)
				wantErr(t, err, ErrInvalidOption)
			}
			if inMountTable(t, d) {
				t.Error("mounted")
			}
		})
	}
}

// TestSELinuxMapped: a label and an id map go together.
func TestSELinuxMapped(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "selinux", "idmap")
	const label = "system_u:object_r:container_file_t:s0:c1,c2"
	d := newTestDriver(t, t.TempDir(), Options{})
	deepChain(t, d, 2)
	must(t, d.CreateReadWrite("box", "layer1", nil))
	have, err := d.mapping()
	must(t, err)
	for _, by := range []mappedBy{have, mappedAttached} {
		d.mapped = by
		path, err := d.GetWith("box", MountOpts{Label: label, IDMap: mapAt(100000)})
		must(t, err)
		got := make([]byte, 256)
		n, err := unix.Lgetxattr(path+"/f0", "security.selinux", got)
		must(t, err)
		if s := strings.TrimRight(string(got[:n]), "\x00"); s != label {
			t.Errorf("label %q", s)
		}
		must(t, d.Put("box"))
	}
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
