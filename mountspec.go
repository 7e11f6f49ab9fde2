//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
)

// mountSpec is an overlay mount as a value. Its names are relative to home and need no
// escaping there: links are base32, and upper and work are reached through a link.
type mountSpec struct {
	home    string
	lowers  []string // nearest first
	upper   string   // empty for a read-only mount
	work    string
	options []string
	label   string
}

// data returns the option string of mount(2), each name after prefix, which is either
// empty (relative names) or home with a slash.
func (s mountSpec) data(prefix string) string {
	prefix = escapeMountName(prefix)
	var b strings.Builder
	b.WriteString("lowerdir=")
	for i, lower := range s.lowers {
		if i > 0 {
			b.WriteByte(':')
		}
		b.WriteString(prefix)
		b.WriteString(escapeMountName(lower))
	}
	if s.upper != "" {
		b.WriteString(",upperdir=" + prefix + escapeMountName(s.upper))
		b.WriteString(",workdir=" + prefix + escapeMountName(s.work))
	}
	for _, o := range s.options {
		b.WriteString("," + o)
	}
	return label.FormatMountLabel(b.String(), s.label)
}

// mountNameEscaper puts a backslash before what separates options and layers
// (ovl_next_opt and ovl_split_lowerdirs of fs/overlayfs; the same for upperdir).
var mountNameEscaper = strings.NewReplacer(`\`, `\\`, `,`, `\,`, `:`, `\:`)

func escapeMountName(s string) string { return mountNameEscaper.Replace(s) }

// mount mounts the overlay at target, a name relative to home: with absolute names
// where they fit into a page, otherwise with relative ones on a thread that stands in
// home. Longer ones are ErrMountTooLong.
func (s mountSpec) mount(target string, _ MountMethod) error {
	if data := s.data(s.home + "/"); len(data) <= sys.MaxMountData() {
		return sys.MountOverlay(s.home+"/"+target, data, 0)
	}
	data := s.data("")
	if len(data) > sys.MaxMountData() {
		return fmt.Errorf("%w: %d layers take %d bytes, mount(2) takes %d", ErrMountTooLong, len(s.lowers), len(data), sys.MaxMountData())
	}
	return sys.MountOverlayFrom(s.home, target, data, 0)
}

// unmountGone detaches the mount at path. That nothing is mounted there is no error.
func unmountGone(path string) error {
	err := sys.Unmount(path)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
