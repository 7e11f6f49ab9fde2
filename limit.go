//go:build linux

package overlay2

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/bcc2decd/overlay2/archive"
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
	err := d.quota.Clear(filepath.Join(d.home, stagingDir, name))
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil // a file or a link that was to be renamed when the process ended: it has no limits
	}
	return ignoreAbsent(err)
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

// usedUp reports whether a layer's limits leave no room for another file.
func (d *Driver) usedUp(l *layer) bool {
	if d.quota == nil {
		return false
	}
	const file = 64 << 10 // a block, and what the directory grows by
	may, has, err := d.quota.Get(l.dir())
	return err == nil && (may.Bytes != 0 && has.Bytes+file > may.Bytes || may.Inodes != 0 && has.Inodes >= may.Inodes)
}

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
