//go:build !(mips || mipsle || mips64 || mips64le || ppc || ppc64 || ppc64le || sparc || sparc64)

package quota

// FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR: _IOR('X', 31, struct fsxattr) and
// _IOW('X', 32, struct fsxattr) by asm-generic/ioctl.h.
const (
	ioctlGetXattr = 0x801c581f
	ioctlSetXattr = 0x401c5820
)
