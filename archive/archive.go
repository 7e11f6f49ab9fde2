// Package archive turns a tar stream into the directory of a layer and back.
//
// It knows the two spellings of a deletion: in a tar an empty file named
// ".wh.NAME" (and ".wh..wh..opq" for "nothing below shows through"), on disk what
// overlayfs reads: a character device 0:0, and the xattr overlay.opaque=y. It never
// mounts, forks, or changes the process's umask or working directory.
//
// A name that comes out of a tar or out of a layer is never part of a path string
// given to the kernel: every operation is one component beneath a directory handle,
// symlinks are resolved within the root by the package itself. So no tar and no
// concurrent rename can lead it out of its root.
package archive

import (
	"context"
	"fmt"
	"io"
	"time"
)

// Format says how marks (whiteouts and opaque directories) are kept on disk.
type Format uint8

const (
	// OverlayTrusted is the upper directory of an overlay mounted by root: a
	// whiteout is a character device 0:0, an opaque directory has the xattr
	// trusted.overlay.opaque=y.
	OverlayTrusted Format = iota
	// OverlayUser is the same for an overlay mounted with the option userxattr
	// (Linux 5.11, commit 2d2f2d7322ff): the xattrs are in user.overlay.
	OverlayUser
	// Merged is a tree without marks, such as a mounted overlay or a plain
	// directory: unpacking deletes what a whiteout names.
	Merged
)

// String returns the format's name for messages.
func (f Format) String() string {
	switch f {
	case OverlayTrusted:
		return "overlay"
	case OverlayUser:
		return "overlay-userxattr"
	case Merged:
		return "merged"
	}
	return fmt.Sprintf("Format(%d)", uint8(f))
}

// xattrPrefix returns the prefix of the kernel's private xattrs, "" for Merged.
func (f Format) xattrPrefix() string {
	switch f {
	case OverlayTrusted:
		return "trusted.overlay."
	case OverlayUser:
		return "user.overlay."
	}
	return ""
}

// Kind is what happened to a path. The values are those of Docker's API.
type Kind int

const (
	// Modified says that content, metadata or, for a directory, an entry beneath changed.
	Modified Kind = iota
	// Added says that the parent has nothing at this path.
	Added
	// Deleted says that the parent's entry is gone, with all beneath it.
	Deleted
)

// String returns "C", "A" or "D", the letters of docker diff.
func (k Kind) String() string {
	switch k {
	case Modified:
		return "C"
	case Added:
		return "A"
	case Deleted:
		return "D"
	}
	return fmt.Sprintf("Kind(%d)", int(k))
}

// Change is one difference between a layer and its parent. Path is absolute
// within the layer ("/etc/passwd"); the root itself is never listed.
type Change struct {
	Path string
	Kind Kind
}

// String returns the change as docker diff prints it, "A /etc/passwd".
func (c Change) String() string { return c.Kind.String() + " " + c.Path }

// Stats counts what an operation has done so far.
type Stats struct {
	// Entries is the number of tar entries read or written, marks included.
	Entries int64
	// TarBytes is the number of bytes of the tar stream read or written.
	TarBytes int64
	// Size is the size of the content in bytes: the length of every file and symlink,
	// hard links counted once. The same as Usage would return.
	Size int64
	// Root says that the tar that was unpacked has an entry for the root directory.
	Root bool
	// SkippedDevices counts device nodes that a user namespace may not make.
	SkippedDevices int64
	// SkippedSockets counts sockets, which no tar format can hold.
	SkippedSockets int64
	// SkippedXattrs counts extended attributes that were left out because they belong to the
	// machine (security.selinux, and what Pack finds of others in security. but security.capability) or because of
	// PackOptions.Xattrs.
	SkippedXattrs int64
}

// UnpackOptions says how Unpack is to read a tar. The zero value is good for a
// base layer that root unpacks.
type UnpackOptions struct {
	// Format is how marks are written.
	Format Format
	// IDMap translates the owners in the tar, and those in v3 capabilities, into
	// owners on disk.
	IDMap IDMap
	// Lowers are the diff directories of the ancestors, nearest first; none for a
	// base layer. They are read for what the stream leaves out: the metadata of
	// parent directories, targets of hard links, symlinks on the way to a name, and
	// what an opaque root must hide. Not used with Merged.
	Lowers []string
	// LowersReady, if set, is called at most once, before anything of Lowers but the root
	// directories themselves is looked at: most tars say all, and never need it. So a layer can be
	// unpacked while those below it still are: LowersReady waits for them. An error of
	// it is that of Unpack.
	LowersReady func(context.Context) error
	// Progress, if set, is called with the counts so far about ten times a second and
	// once at the end, by the goroutine that called Unpack.
	Progress func(Stats)
}

// PackOptions says how Pack is to write a tar. The zero value packs a base layer
// that root has written.
type PackOptions struct {
	// Format is how marks are to be read.
	Format Format
	// IDMap translates owners on disk back to owners in the tar. An owner that the
	// map does not cover is an error.
	IDMap IDMap
	// Lowers are the diff directories of the ancestors, nearest first. They are read
	// for what overlayfs left out of the upper directory: content of renamed
	// directories (redirect_dir) and of files of which only the metadata was copied up
	// (metacopy); and to see whether the root's own metadata differs. With Merged only the last is
	// done, and only the first is looked at: the mounted or plain tree that Changes is about.
	Lowers []string
	// Changes, with Merged, restricts the archive to these changes, in the form that
	// Compare returns them; deletions become whiteouts. Nil packs the whole tree.
	Changes []Change
	// Xattrs says which extended attributes the archive has.
	Xattrs Xattrs
	// Clamp, if not zero, is the latest time an entry may have; later ones are set to
	// it (SOURCE_DATE_EPOCH).
	Clamp time.Time
	// NoSparse writes the holes of sparse files as zeros. Layers of images should have no sparse entries
	// (OCI image-spec 1.1, layer.md): what docker and podman keep of a layer (vbatts/tar-split) cannot make
	// such a tar again, so that they could not push it.
	NoSparse bool
	// AllMarks writes the marks that hide nothing in Lowers too, so that the tar is the same whatever lies below, but for
	// the content that Lowers are read for.
	AllMarks bool
	// Progress, if set, is called with the counts so far about ten times a second and
	// once at the end, by the goroutine that reads.
	Progress func(Stats)
}

// Reader is a tar stream made while it is read. Reading in large pieces, or
// through WriteTo (io.Copy does), is fastest. It ends with io.EOF only when the whole
// archive was delivered without an error.
//
// Close releases what is open; the rest of the stream need not be read.
type Reader interface {
	io.ReadCloser
	io.WriterTo
	// Stats returns the counts so far.
	Stats() Stats
}
