package archive

import (
	"encoding/binary"
	"strings"
)

const (
	xattrCapability = "security.capability"
	xattrSELinux    = "security.selinux"
	xattrACL        = "system.posix_acl_access"
	xattrDefaultACL = "system.posix_acl_default"
)

// escapeXattr returns the name under which an xattr of a tar is kept in a layer, where
// one of overlayfs's own must not take effect..
func escapeXattr(name string) string {
	for _, prefix := range []string{trustedOverlay, userOverlay} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			return prefix + escaped + rest
		}
	}
	return name
}

// isPrivate says that a name on disk is one of overlayfs's own marks.
func isPrivate(name string) bool {
	for _, prefix := range []string{trustedOverlay, userOverlay} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			return !strings.HasPrefix(rest, escaped)
		}
	}
	return false
}

// mapXattr returns the value that an xattr of a tar gets on disk: the ids in it mapped.
func (m IDMap) mapXattr(name, value string) (string, error) {
	if m.Empty() {
		return value, nil
	}
	switch name {
	case xattrCapability:
		return m.mapCapability(value)
	case xattrACL, xattrDefaultACL:
		return m.mapACL(value)
	}
	return value, nil
}

// Layout of struct vfs_ns_cap_data (include/uapi/linux/capability.h): a magic with the
// revision in its top byte, two pairs of masks, and in revision 3 (Linux 4.14, commit
// 8db6c34f1dbc) the root user of the namespace in which they count.
const (
	capRevisionMask = 0xff000000
	capRevision2    = 0x02000000
	capRevision3    = 0x03000000
	capSize2        = 20
	capSize3        = 24
)

// mapCapability maps the root user of a v3 capability. A v2 one counts only for root of
// the initial namespace: where container root is somebody else on the host it becomes a v3
// one for that user, which is what the kernel itself stores when root of a user
// namespace sets it.
func (m IDMap) mapCapability(value string) (string, error) {
	b := []byte(value)
	if len(b) < 4 {
		return value, nil // the kernel refuses it
	}
	magic := binary.LittleEndian.Uint32(b)
	var root uint32
	switch {
	case magic&capRevisionMask == capRevision2 && len(b) == capSize2:
	case magic&capRevisionMask == capRevision3 && len(b) == capSize3:
		root = binary.LittleEndian.Uint32(b[capSize2:])
	default:
		return value, nil
	}
	host, err := toHost(m.UIDs, "uid", root)
	if err != nil {
		return "", err
	}
	if host == 0 && len(b) == capSize2 {
		return value, nil
	}
	binary.LittleEndian.PutUint32(b, magic&^capRevisionMask|capRevision3)
	return string(binary.LittleEndian.AppendUint32(b[:capSize2], host)), nil
}

// A POSIX ACL as xattr (include/uapi/linux/posix_acl_xattr.h): version 2, then entries of
// tag u16, permissions u16, id u32, all little endian.
const (
	aclHeader = 4
	aclEntry  = 8
	aclUser   = 0x02
	aclGroup  = 0x08
)

// mapACL maps the users and groups that an ACL names.
func (m IDMap) mapACL(value string) (string, error) {
	b := []byte(value)
	if len(b) < aclHeader || (len(b)-aclHeader)%aclEntry != 0 {
		return value, nil // the kernel refuses it
	}
	for e := b[aclHeader:]; len(e) > 0; e = e[aclEntry:] {
		id := binary.LittleEndian.Uint32(e[4:])
		var err error
		switch binary.LittleEndian.Uint16(e) {
		case aclUser:
			id, err = toHost(m.UIDs, "uid", id)
		case aclGroup:
			id, err = toHost(m.GIDs, "gid", id)
		}
		if err != nil {
			return "", err
		}
		binary.LittleEndian.PutUint32(e[4:], id)
	}
	return string(b), nil
}
