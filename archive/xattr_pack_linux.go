package archive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// The prefixes of xattrs that overlayfs keeps for itself; which one depends on userxattr.
const (
	trustedOverlay = "trusted.overlay."
	userOverlay    = "user.overlay."
	// escaped follows the prefix in the name by which overlayfs stores an xattr that a user of the
	// mount gave such a name (Linux 6.7, commit dad02fad84cb).
	escaped = "overlay."
)

// xattrNames says which xattrs of a tree belong to its content.
type xattrNames struct {
	// raw: the tree is a mounted overlay, whose own xattrs the kernel hides: a name that
	// looks like one of these is content.
	raw bool
	// choice restricts what is content further.
	choice Xattrs
}

// content returns the name by which a tar has the xattr, "" for one that it doesn't have: skipped
// says that this is a loss, as it is none of overlayfs's own.
func (n xattrNames) content(attr string) (name string, skipped bool) {
	switch {
	case !n.raw && isPrivate(attr):
		return "", false
	case !n.raw && isEscaped(attr):
		attr = unescapeXattr(attr)
	case machineXattr(attr):
		// What xfs shows of ACLs a second time is no loss.
		return "", attr == xattrSELinux
	}
	switch {
	case strings.HasPrefix(attr, "user."), attr == xattrCapability:
		return attr, false
	case strings.HasPrefix(attr, "trusted."), attr == xattrACL, attr == xattrDefaultACL:
		if n.choice == AllXattrs {
			return attr, false
		}
	}
	return "", true
}

// isEscaped says that overlayfs stores an xattr by this name that its users see by another.
func isEscaped(attr string) bool { return unescapeXattr(attr) != attr }

// unescapeXattr is the way back from escapeXattr.
func unescapeXattr(attr string) string {
	for _, prefix := range []string{trustedOverlay, userOverlay} {
		if rest, ok := strings.CutPrefix(attr, prefix+escaped); ok {
			return prefix + rest
		}
	}
	return attr
}

// xattrSource reads the xattrs of one file: an open one, or one by its name beneath an
// open directory if fd is -1.
type xattrSource struct {
	fd    int
	dirfd int
	name  sys.Name
}

// list returns the names, each ended by a NUL, in buf or a larger one.
func (s xattrSource) list(buf []byte) (names, grown []byte, err error) {
	for {
		var n int
		if s.fd >= 0 {
			n, err = sys.Flistxattr(s.fd, buf)
		} else {
			n, err = sys.ListxattrName(s.dirfd, s.name, buf)
		}
		switch {
		case err == nil:
			return buf[:n], buf, nil
		case noXattr(err):
			return nil, buf, nil
		case !errors.Is(err, unix.ERANGE) || len(buf) > 64<<10:
			return nil, buf, err
		}
		buf = make([]byte, 64<<10+1)
	}
}

func (s xattrSource) get(attr string) ([]byte, error) {
	if s.fd >= 0 {
		return sys.Fgetxattr(s.fd, attr)
	}
	return sys.Getxattrat(s.dirfd, s.name.String(), attr)
}

// content reads the xattrs among names that belong to the content, sorted by name, appended to dst.
// The others that are a loss are counted.
func (s xattrSource) content(dst []tarXattr, names []byte, which xattrNames) (_ []tarXattr, lost int64, err error) {
	for len(names) > 0 {
		attr := names
		if end := bytes.IndexByte(names, 0); end >= 0 {
			attr, names = names[:end], names[end+1:]
		} else {
			names = nil
		}
		name, skipped := which.content(string(attr))
		if skipped {
			lost++
		}
		if name == "" {
			continue
		}
		value, err := s.get(string(attr))
		if errors.Is(err, unix.ENODATA) {
			continue // removed since it was listed
		}
		if err != nil {
			return dst, lost, fmt.Errorf("%s: %w", attr, err)
		}
		dst = append(dst, tarXattr{name, string(value)})
	}
	slices.SortFunc(dst, func(a, b tarXattr) int { return strings.Compare(a.name, b.name) })
	return dst, lost, nil
}

// packXattrs translates the owners that values hold.
func packXattrs(xattrs []tarXattr, m IDMap) error {
	if m.Empty() {
		return nil
	}
	for i := range xattrs {
		x := &xattrs[i]
		var err error
		switch x.name {
		case xattrCapability:
			x.value, err = packCapability(x.value, m)
		case xattrACL, xattrDefaultACL:
			x.value, err = packACL(x.value, m)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
	}
	return nil
}

// packCapability is the way back from mapCapability: a capability of the container's root
// is version 2 again, which is what set it there.
func packCapability(value string, m IDMap) (string, error) {
	b := []byte(value)
	if len(b) != capSize3 || binary.LittleEndian.Uint32(b)&capRevisionMask != capRevision3 {
		return value, nil
	}
	uid, err := toContainer(m.UIDs, "uid", binary.LittleEndian.Uint32(b[capSize2:]))
	if err != nil {
		return "", err
	}
	if uid == 0 {
		binary.LittleEndian.PutUint32(b, binary.LittleEndian.Uint32(b)&^capRevisionMask|capRevision2)
		return string(b[:capSize2]), nil
	}
	binary.LittleEndian.PutUint32(b[capSize2:], uid)
	return string(b), nil
}

// packACL is the way back from mapACL.
func packACL(value string, m IDMap) (string, error) {
	b := []byte(value)
	if len(b) < aclHeader || (len(b)-aclHeader)%aclEntry != 0 {
		return "", fmt.Errorf("%d bytes are no ACL: %w", len(b), unix.EINVAL)
	}
	for e := b[aclHeader:]; len(e) > 0; e = e[aclEntry:] {
		id := binary.LittleEndian.Uint32(e[4:])
		var err error
		switch binary.LittleEndian.Uint16(e) {
		case aclUser:
			id, err = toContainer(m.UIDs, "uid", id)
		case aclGroup:
			id, err = toContainer(m.GIDs, "gid", id)
		default:
			continue
		}
		if err != nil {
			return "", err
		}
		binary.LittleEndian.PutUint32(e[4:], id)
	}
	return string(b), nil
}
