//go:build mips || mipsle || mips64 || mips64le || ppc || ppc64 || ppc64le || sparc || sparc64

package quota

// FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR on architectures whose ioctl numbers have
// three direction bits, of which 2 means read and 4 write.
const (
	ioctlGetXattr = 0x401c581f
	ioctlSetXattr = 0x801c5820
)
