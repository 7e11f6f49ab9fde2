package sys

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// fsNames are the names that Docker shows for a filesystem's magic number (linux/magic.h).
var fsNames = map[int64]string{
	0x61756673:                 "aufs",
	unix.BTRFS_SUPER_MAGIC:     "btrfs",
	unix.CRAMFS_MAGIC:          "cramfs",
	unix.ECRYPTFS_SUPER_MAGIC:  "ecryptfs",
	0xe0f5e1e2:                 "erofs",
	unix.EXT4_SUPER_MAGIC:      "extfs",
	unix.F2FS_SUPER_MAGIC:      "f2fs",
	0x65735546:                 "fuse",
	0x01161970:                 "gfs2",
	0x0bd00bd0:                 "lustre",
	unix.NFS_SUPER_MAGIC:       "nfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
	unix.RAMFS_MAGIC:           "ramfs",
	unix.SQUASHFS_MAGIC:        "squashfs",
	unix.TMPFS_MAGIC:           "tmpfs",
	unix.XFS_SUPER_MAGIC:       "xfs",
	0x2fc12fc1:                 "zfs",
	0xca451a4e:                 "bcachefs",
}

// FSName returns the name of the filesystem that fd lies on, "<unknown>" for one without a known magic.
func FSName(fd int) (string, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(fd, &st) }); err != nil {
		return "", err
	}
	// Magic numbers are 32 bits; the field's width and sign differ by architecture.
	if name, ok := fsNames[int64(uint32(st.Type))]; ok {
		return name, nil
	}
	return "<unknown>", nil
}

// KernelVersion is a kernel's major and minor number.
type KernelVersion struct{ Major, Minor int }

// Less reports whether v is older than o.
func (v KernelVersion) Less(o KernelVersion) bool {
	return v.Major < o.Major || v.Major == o.Major && v.Minor < o.Minor
}

// String returns "MAJOR.MINOR".
func (v KernelVersion) String() string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

// ParseKernelVersion reads the release that uname(2) gives, such as "6.1.0-37-amd64".
func ParseKernelVersion(release string) (KernelVersion, error) {
	var v KernelVersion
	if _, err := fmt.Sscanf(release, "%d.%d", &v.Major, &v.Minor); err != nil {
		return KernelVersion{}, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return v, nil
}

// Kernel returns the version of the running kernel.
func Kernel() (KernelVersion, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return KernelVersion{}, err
	}
	return ParseKernelVersion(unix.ByteSliceToString(u.Release[:]))
}

// InUserNamespace reports whether the process's ids are not the initial namespace's.
func InUserNamespace() (bool, error) {
	data, err := ReadFileAt(unix.AT_FDCWD, "/proc/self/uid_map", 64<<10)
	if err == unix.ENOENT {
		return false, nil // a kernel without user namespaces
	}
	if err != nil {
		return false, err
	}
	f := strings.Fields(string(data))
	return len(f) != 3 || f[0] != "0" || f[1] != "0" || f[2] != "4294967295", nil
}

// HasDType reports whether reading the open directory fd tells the types of its entries.
// The directory must hold at least one.
func HasDType(fd int) (bool, error) {
	var r DirReader
	if err := r.Reset(fd); err != nil {
		return false, err
	}
	name, typ, err := r.Next()
	if err == nil && name == nil {
		err = fmt.Errorf("directory is empty: %w", unix.ENOENT)
	}
	return typ != unix.DT_UNKNOWN, err
}
