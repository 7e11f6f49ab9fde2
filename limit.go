//go:build linux

package overlay2

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/bcc2decd/overlay2/quota"
	"golang.org/x/sys/unix"
)

// openQuota finds out whether layers can be limited. That they cannot is an error only
// once a limit is asked for.
func (d *Driver) openQuota() error {
	d.quota, d.quotaErr = quota.Open(d.home)
	if d.quotaErr != nil && (d.opts.Size > 0 || d.opts.Inodes > 0) {
		return d.noQuota()
	}
	return nil
}

// hasQuota reports whether layers can be limited here.
func (d *Driver) hasQuota() bool { return d.quota != nil }

// noQuota says what is missing for limits.
func (d *Driver) noQuota() error {
	return fmt.Errorf("%w: size and inodes limits: %w", ErrNotSupported, d.quotaErr)
}

// limitNew gives a layer in staging, still empty, its limits. All that will be made
// in it, diff and work among them, is of one project, as overlayfs needs for renames.
func (d *Driver) limitNew(name string, l limits) error {
	if l == (limits{}) {
		return nil
	}
	err := d.quota.Set(filepath.Join(d.home, stagingDir, name), quota.Limits{Bytes: l.size, Inodes: l.inodes})
	if errors.Is(err, quota.ErrInvalidLimit) || errors.Is(err, quota.ErrBelowUsage) {
		err = fmt.Errorf("%w: %w", ErrInvalidOption, err)
	}
	return err
}

// unlimit lifts the limits of a layer in staging that is to be deleted. They would
// outlive it and keep the project from being used again.
func (d *Driver) unlimit(name string) error {
	if d.quota == nil {
		return nil
	}
	return ignoreAbsent(d.quota.Clear(filepath.Join(d.home, stagingDir, name)))
}

// limitedUnpack is archive.Unpack for a layer that may have limits. ext4 does not hold
// them against CAP_SYS_RESOURCE, which root has, so usage is looked at meanwhile and in
// the end; what is over a limit is EDQUOT (xfs itself says ENOSPC).
func (d *Driver) limitedUnpack(l *layer, unpack func(context.Context, func(archive.Stats)) (archive.Stats, error)) (archive.Stats, error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	check := func() error { return nil }
	var progress func(archive.Stats)
	if d.quota != nil {
		_, _, err := d.quota.Get(l.dir())
		switch {
		case err == nil:
			check = func() error { return d.checkLimits(l) }
			progress = func(archive.Stats) {
				if err := check(); err != nil {
					cancel(err)
				}
			}
		case !errors.Is(err, quota.ErrNoProject):
			return archive.Stats{}, err
		}
	}
	stats, err := unpack(ctx, progress)
	if cause := context.Cause(ctx); cause != nil {
		return stats, cause
	}
	if err == nil {
		err = check()
	}
	return stats, err
}

// dir returns the host path of the layer's directory.
func (l *layer) dir() string { return filepath.Join(l.home, l.id) }

// checkLimits returns EDQUOT if a layer holds more than it may.
func (d *Driver) checkLimits(l *layer) error {
	may, has, err := d.quota.Get(l.dir())
	switch {
	case err != nil:
		return err
	case may.Bytes != 0 && has.Bytes > may.Bytes:
		return fmt.Errorf("%d bytes, the limit is %d: %w", has.Bytes, may.Bytes, unix.EDQUOT)
	case may.Inodes != 0 && has.Inodes > may.Inodes:
		return fmt.Errorf("%d inodes, the limit is %d: %w", has.Inodes, may.Inodes, unix.EDQUOT)
	}
	return nil
}

// Usage returns what the layer takes on disk. For one with limits this costs the same
// however large it is; else its directory is walked. The figures differ from DiffSize: they are blocks and
// inodes, with all directories and what overlayfs and the driver keep beside diff.
func (d *Driver) Usage(id string) (Usage, error) {
	u, err := d.usage(id)
	return u, layerErr("usage", id, err)
}

func (d *Driver) usage(id string) (Usage, error) {
	l, err := openLayer(d.home, id)
	if err != nil {
		return Usage{}, err
	}
	defer l.close()
	if d.quota != nil {
		may, has, err := d.quota.Get(l.dir())
		if err == nil {
			return Usage{Bytes: has.Bytes, Inodes: has.Inodes, MaxBytes: may.Bytes, MaxInodes: may.Inodes}, nil
		}
		if !errors.Is(err, quota.ErrNoProject) {
			return Usage{}, err
		}
	}
	w := usageWalk{links: make(map[uint64]bool)}
	var st unix.Stat_t
	if err := sys.Fstat(l.fd, &st); err != nil {
		return Usage{}, err
	}
	w.dev = uint64(st.Dev)
	w.add(&st)
	return w.usage, w.dir(l.fd)
}

// usageWalk adds up blocks and inodes of a tree on one filesystem.
type usageWalk struct {
	usage Usage
	dev   uint64
	links map[uint64]bool // inodes with several names that were counted
}

// dir adds what lies in an open directory. Something that is deleted meanwhile is not an error.
func (w *usageWalk) dir(fd int) error {
	var failed error
	err := sys.ReadNames(fd, func(name string) bool {
		if failed = ignoreAbsent(w.entry(fd, name)); failed != nil {
			failed = fmt.Errorf("%s: %w", name, failed)
		}
		return failed == nil
	})
	return errors.Join(failed, err)
}

func (w *usageWalk) entry(dirfd int, name string) error {
	var st unix.Stat_t
	if err := sys.Fstatat(dirfd, name, &st); err != nil {
		return err
	}
	if uint64(st.Dev) != w.dev {
		return nil // the layer's own mount
	}
	w.add(&st)
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	fd, err := sys.OpenDirat(dirfd, name)
	if err != nil {
		return err
	}
	return errors.Join(w.dir(fd), sys.Close(fd))
}

func (w *usageWalk) add(st *unix.Stat_t) {
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if w.links[st.Ino] {
			return
		}
		w.links[st.Ino] = true
	}
	w.usage.Inodes++
	w.usage.Bytes += uint64(st.Blocks) * 512
}
