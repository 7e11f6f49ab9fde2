package overlay2

import "github.com/bcc2decd/overlay2/archive"

// MountOpts are the options of a mount; see Driver.Mount and Driver.GetWith.
type MountOpts struct {
	// Label is the SELinux label of the mount, or "".
	Label string
	// IDMap shows the owners on disk (ContainerID) as others (HostID), those of a container's user
	// namespace, so that one copy of an image serves containers with different maps. What a container writes has
	// the image's owners on disk again: its Diff needs no map. An owner that the map does not
	// cover is shown as nobody, and cannot be written. The zero value changes nothing.
	//
	// It is for a Driver without Options.IDMap, with which the layers are mapped on disk. Where the
	// kernel (5.19), the filesystem or the lack of privileges does not allow it, it is ErrNotSupported.
	IDMap archive.IDMap
}

// MountData is a mount as data, for runtimes that mount by themselves. Paths are absolute.
//
// A mount with mapped owners (MountOpts.IDMap) cannot be said in such data: overlayfs has no option for it. Its
// layers must be idmapped mounts themselves, which exist only as open files or in a mount namespace, and its maker must
// be the container's root for the kernel. For those there is Driver.GetWith, whose path can be bound.
type MountData struct {
	// Type is "overlay", or "bind" for a layer without a parent.
	Type string
	// Source is "overlay", or the directory to bind.
	Source string
	// Options are those of mount(8), of an OCI runtime's mounts and of containerd's, each one
	// string, such as "lowerdir=/a:/b": what separates layers and options in paths has a backslash before
	// it. Together they may be longer than mount(2) takes.
	Options []string
	// Fsconfig are the same options as keys and values of fsconfig(2), in the order in which they
	// must be set (Linux 6.7); a flag has no value. Nil for a bind mount.
	Fsconfig [][2]string
	// ReadOnly says that the layer must not be written.
	ReadOnly bool
}
