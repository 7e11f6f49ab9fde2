package archive

// ReadOptions says how Changes and OpenFile are to read a layer. The zero value reads a base
// layer that root has written.
type ReadOptions struct {
	// Format is how marks are to be read.
	Format Format
	// Lowers are the diff directories of the ancestors, nearest first.
	Lowers []string
}

// Xattrs is a choice of extended attributes. None ever includes those that overlayfs
// keeps for itself, or labels of the machine such as security.selinux.
type Xattrs uint8

const (
	// AllXattrs are user.*, trusted.*, security.capability and POSIX ACLs.
	AllXattrs Xattrs = iota
	// PortableXattrs are user.* and security.capability: what unpackers on any machine know.
	PortableXattrs
)
