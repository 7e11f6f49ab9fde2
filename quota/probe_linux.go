package quota

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/bcc2decd/overlay2/internal/sys"
)

// probe fills in what Control must know about the home, open as fd, or says why there
// can be no quotas, in the order in which a person would have to mend it.
func (c *Control) probe(fd int) error {
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return err
	}
	c.dev = uint64(st.Dev)
	var name, how string
	switch uint32(fs.Type) {
	case unix.XFS_SUPER_MAGIC:
		name = "xfs"
		how = "mount it with -o prjquota (a remount does not turn it on; for the root filesystem boot with rootflags=prjquota)"
	case unix.EXT4_SUPER_MAGIC:
		name = "ext4"
		how = "run tune2fs -O quota,project on the unmounted device and mount it with -o prjquota"
	default:
		return unsupported(nil, "they need xfs or ext4, this filesystem has magic number %#x", uint32(fs.Type))
	}
	if in, err := sys.InUserNamespace(); err != nil {
		return err
	} else if in {
		return unsupported(unix.EPERM, "the kernel manages them only for the initial user namespace")
	}
	if !hasQuotactlFd() {
		var err error
		if c.device, err = findDevice(fd, c.home); err != nil {
			return unsupported(err, "the kernel has no quotactl_fd (Linux 5.14), and there is no usable device node")
		}
	}
	k := kernel{fd: fd, device: c.device}
	flags, err := k.state()
	switch {
	case errors.Is(err, unix.EPERM):
		return unsupported(err, "the process needs CAP_SYS_ADMIN")
	case err != nil:
		return err
	case flags&projectAccounting == 0:
		return unsupported(nil, "%s is mounted without project quota: %s", name, how)
	case flags&projectEnforced == 0:
		return unsupported(nil, "%s counts projects but does not enforce limits: mount it with -o prjquota", name)
	}
	if _, err := k.next(0); err != nil && !noneLeft(err) {
		if errors.Is(err, unix.EPERM) {
			return unsupported(err, "the process needs CAP_SYS_ADMIN")
		}
		return unsupported(err, "the kernel cannot list projects in use (Linux 4.6)")
	}
	x, err := getXattr(fd)
	if err != nil {
		return unsupported(err, "the project of the home cannot be read")
	}
	if x.xflags&xflagProjinherit != 0 {
		// A directory with another project cannot be renamed into one that hands on
		// its own (EXDEV), and what it holds would escape the limit meant for the home.
		return unsupported(nil, "the home hands on its own project %d, which excludes others in it: run chattr -P on it", x.projid)
	}
	c.base = x.projid
	return nil
}

// unsupported returns an error over ErrNotSupported and, if there is one, its cause.
func unsupported(cause error, format string, args ...any) error {
	err := fmt.Errorf("%w: %s", ErrNotSupported, fmt.Sprintf(format, args...))
	if cause != nil {
		err = fmt.Errorf("%w: %w", err, cause)
	}
	return err
}
