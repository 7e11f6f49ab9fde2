package quota

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/bcc2decd/overlay2/internal/sys"
)

// Control manages the quotas of directories on the filesystem of one home. It is safe
// for concurrent use, holds nothing open between calls, and other processes may manage
// the same filesystem.
type Control struct {
	// Immutable after Open.
	home   string          // absolute
	dev    uint64          // st_dev of the home
	device string          // see kernel
	base   uint32          // the home's own project
	noted  map[uint32]bool // ids an administrator has names for

	mu      sync.Mutex
	nextID  uint32   // where to look for a free id first; protected by mu
	cleared []uint32 // ids to be used again when their trees are gone; protected by mu
}

// Open finds out whether directories on home's filesystem can have quotas, and how.
// An error over ErrNotSupported says what is missing: the filesystem is not xfs or
// ext4, is mounted without prjquota, or the process may not. It costs a few system
// calls however many layers home holds.
func Open(home string) (*Control, error) {
	abs, err := filepath.Abs(home)
	if err != nil {
		return nil, err
	}
	fd, err := openDir(abs)
	if err != nil {
		return nil, wrap("open", home, err)
	}
	c := &Control{home: abs, noted: reservedIDs()}
	if err := errors.Join(c.probe(fd), sys.Close(fd)); err != nil {
		return nil, wrap("open", home, err)
	}
	return c, nil
}

// openDir opens the home, which may be a symlink.
func openDir(path string) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// Set gives dir, which must be an empty directory on the home's filesystem, a project of its
// own, hands that on to all that will be made in dir, and limits it. What fails leaves
// dir as it was.
//
// Errors: ErrInvalidLimit, ErrHasProject, ErrBelowUsage if the limit does not
// even hold the directory itself, ENOTEMPTY, EXDEV, EROFS.
func (c *Control) Set(dir string, limits Limits) error {
	return c.with("set", dir, func(k kernel) error {
		if err := c.checkLimits(limits); err != nil {
			return err
		}
		if err := checkEmpty(k.fd); err != nil {
			return err
		}
		old, err := getXattr(k.fd)
		if err != nil {
			return err
		}
		if old.projid != 0 && old.projid != c.base {
			return fmt.Errorf("%w (%d)", ErrHasProject, old.projid)
		}
		id, err := c.claim(k, old)
		if err != nil {
			return err
		}
		if err := k.limit(id, limits); err != nil {
			// First the limits, while the id is surely ours.
			return errors.Join(err, k.set(id, Limits{}), setXattr(k.fd, old))
		}
		return nil
	})
}

// Get returns the limits and the usage of dir's project, whatever the size of the tree
// in constant time. ErrNoProject if dir has none of its own.
func (c *Control) Get(dir string) (Limits, Usage, error) {
	var l Limits
	var u Usage
	err := c.with("get", dir, func(k kernel) error {
		id, err := c.projectOf(k.fd)
		if err != nil {
			return err
		}
		q, err := k.get(id)
		if err != nil {
			return err
		}
		l = Limits{Bytes: q.blkHard * basicBlock, SoftBytes: q.blkSoft * basicBlock, Inodes: q.inoHard, SoftInodes: q.inoSoft}
		u = Usage{Bytes: q.blkCount * basicBlock, Inodes: q.inoCount}
		return nil
	})
	return l, u, err
}

// Resize replaces the limits of dir's project; the tree may be in use. ErrBelowUsage,
// and nothing changed, if the tree holds more already; ErrNoProject if dir has no
// project of its own.
func (c *Control) Resize(dir string, limits Limits) error {
	return c.with("resize", dir, func(k kernel) error {
		if err := c.checkLimits(limits); err != nil {
			return err
		}
		id, err := c.projectOf(k.fd)
		if err != nil {
			return err
		}
		return k.limit(id, limits)
	})
}

// Clear lifts the limits of dir's project. Files keep the project, so its id is not
// given to another directory before the last of them is gone: call Clear, then delete
// the tree. A directory without a project of its own is left alone, without an error.
func (c *Control) Clear(dir string) error {
	return c.with("clear", dir, func(k kernel) error {
		id, err := c.projectOf(k.fd)
		if errors.Is(err, ErrNoProject) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := k.set(id, Limits{}); err != nil {
			return err
		}
		c.mu.Lock()
		if !slices.Contains(c.cleared, id) {
			c.cleared = append(c.cleared, id)
		}
		c.mu.Unlock()
		return nil
	})
}

// with opens dir, a directory on the home's filesystem and no symlink, and calls f.
func (c *Control) with(op, dir string, f func(k kernel) error) error {
	fd, err := sys.OpenRoot(dir)
	if err != nil {
		return wrap(op, dir, err)
	}
	var st unix.Stat_t
	err = sys.Fstat(fd, &st)
	if err == nil && uint64(st.Dev) != c.dev {
		err = fmt.Errorf("not on the filesystem of the home: %w", unix.EXDEV)
	}
	if err == nil {
		err = f(kernel{fd: fd, device: c.device})
	}
	return wrap(op, dir, errors.Join(err, sys.Close(fd)))
}

// projectOf returns the project that an open directory has for itself. One that it
// shares with the home, or that an administrator has a name for, is not ours to change.
func (c *Control) projectOf(fd int) (uint32, error) {
	x, err := getXattr(fd)
	if err != nil {
		return 0, err
	}
	if x.projid == 0 || x.projid == c.base || c.noted[x.projid] {
		return 0, ErrNoProject
	}
	return x.projid, nil
}

// limit sets the limits of a project in use. The kernel would accept less than what is
// used already and then refuse every write.
func (k kernel) limit(id uint32, l Limits) error {
	q, err := k.get(id)
	if err != nil {
		return err
	}
	if l.Bytes != 0 && blocks(l.Bytes) < q.blkCount {
		return fmt.Errorf("%w: %d bytes, %d used", ErrBelowUsage, l.Bytes, q.blkCount*basicBlock)
	}
	if l.Inodes != 0 && l.Inodes < q.inoCount {
		return fmt.Errorf("%w: %d inodes, %d used", ErrBelowUsage, l.Inodes, q.inoCount)
	}
	return k.set(id, l)
}

// checkLimits reports limits that cannot be meant.
func (c *Control) checkLimits(l Limits) error {
	switch {
	case l == Limits{}:
		return fmt.Errorf("%w: neither bytes nor inodes", ErrInvalidLimit)
	case l.Bytes != 0 && l.SoftBytes > l.Bytes:
		return fmt.Errorf("%w: soft limit of %d bytes above the hard one of %d", ErrInvalidLimit, l.SoftBytes, l.Bytes)
	case l.Inodes != 0 && l.SoftInodes > l.Inodes:
		return fmt.Errorf("%w: soft limit of %d inodes above the hard one of %d", ErrInvalidLimit, l.SoftInodes, l.Inodes)
	}
	// Of the home: xfs and ext4 show the limits themselves as the size of a directory
	// that has some.
	var st unix.Statfs_t
	if err := unix.Statfs(c.home, &st); err != nil {
		return err
	}
	// Type and sign of the fields differ by architecture.
	if size := uint64(st.Blocks) * uint64(st.Bsize); max(l.Bytes, l.SoftBytes) > size {
		return fmt.Errorf("%w: %d bytes, but the filesystem has %d", ErrInvalidLimit, max(l.Bytes, l.SoftBytes), size)
	}
	return nil
}

// checkEmpty reports ENOTEMPTY if an open directory has an entry: that would stay
// outside of the project.
func checkEmpty(fd int) error {
	var buf [512]byte
	for {
		n, err := unix.ReadDirent(fd, buf[:])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return nil
		}
		if _, count, _ := unix.ParseDirent(buf[:n], -1, nil); count > 0 {
			return unix.ENOTEMPTY
		}
	}
}

// wrap adds the verb and the path to an error.
func wrap(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: "quota " + op, Path: path, Err: err}
}
