package archive

import (
	"bytes"
	"context"
	"io"
	"path/filepath"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// TestXattrACLOnceFromXFS: xfs shows an ACL as trusted.SGI_ACL_FILE, too. In a tar that
// would be a second copy, which only xfs understands.
func TestXattrACLOnceFromXFS(t *testing.T) {
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "xfs"})
	acl := `\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x06\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff`
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	overlaytest.Build(t, from, `file a 0664 "x" system.posix_acl_access="`+acl+`"`)
	overlaytest.Build(t, to, "")
	r, err := Pack(context.Background(), from, PackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(stream, []byte("SGI_ACL")) {
		t.Error("the tar has the ACL twice")
	}
	mustUnpack(t, to, stream, UnpackOptions{})
	overlaytest.Compare(t, overlaytest.Tree(t, from), overlaytest.Tree(t, to))
}

// TestCapabilityRoundTrip: what mapCapability makes on disk, packCapability takes back.
func TestCapabilityRoundTrip(t *testing.T) {
	m := IDMap{UIDs: []IDRange{{0, 100000, 65536}}, GIDs: []IDRange{{0, 100000, 65536}}}
	masks := "\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	for _, value := range []string{"\x01\x00\x00\x02" + masks, "\x01\x00\x00\x03" + masks + "\xe8\x03\x00\x00", "short", "\x01\x00\x00\x01" + masks[:8]} {
		disk, err := m.mapXattr(xattrCapability, value)
		if err != nil {
			t.Fatal(err)
		}
		back, err := packCapability(disk, m)
		if err != nil || back != value {
			t.Errorf("%q became %q and then %q, %v", value, disk, back, err)
		}
	}
}
