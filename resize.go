//go:build linux

package overlay2

import (
	"errors"
	"fmt"

	"github.com/bcc2decd/overlay2/quota"
)

// Resize changes the limits of a layer that was made with some, mounted or not: from
// the next write on the new ones hold. The options are those of CreateReadWrite,
// "size" in bytes with an optional unit of 1024 and "inodes"; a limit that is not
// named stays as it is, "none" lifts it. A layer whose limits are lifted can get others, and
// its Usage costs no walk. What fails changes neither of the two.
//
// Errors: ErrLayerNotFound; ErrInvalidOption for no option, an unknown one, a value that is 0
// or neither a number nor "none", a size above that of the filesystem (quota.ErrInvalidLimit) or one below
// what the layer takes already (quota.ErrBelowUsage); ErrNotSupported if the home
// has no project quotas, or for a layer that was made without limits
// (quota.ErrNoProject): the kernel counts by project, and what is in the layer has none.
func (d *Driver) Resize(id string, storageOpt map[string]string) error {
	return layerErr("resize", id, d.resize(id, storageOpt))
}

func (d *Driver) resize(id string, storageOpt map[string]string) error {
	if err := checkID(id); err != nil {
		return err
	}
	if err := checkResize(storageOpt); err != nil {
		return err
	}
	_, unlock := d.layers.lock(id)
	defer unlock()
	l, err := openLayer(d.home, id)
	if err != nil {
		return err
	}
	defer l.close()
	if !d.hasQuota() {
		return d.noQuota()
	}
	// Nobody may remove the layer meanwhile, which would give its project limits that
	// outlive it, or change one limit while the other is changed here.
	if err := l.lockHere(); err != nil {
		return err
	}
	return d.relimit(l, storageOpt)
}

// relimit gives the layer the limits that are named.
func (d *Driver) relimit(l *layer, storageOpt map[string]string) error {
	may, _, err := d.quota.Get(l.dir())
	if err == nil {
		err = d.replaceLimits(l, may, storageOpt)
	}
	switch {
	case errors.Is(err, quota.ErrNoProject):
		return fmt.Errorf("%w: the layer was made without limits: %w", ErrNotSupported, err)
	case errors.Is(err, quota.ErrInvalidLimit), errors.Is(err, quota.ErrBelowUsage):
		return fmt.Errorf("%w: %w", ErrInvalidOption, err)
	}
	return err
}

func (d *Driver) replaceLimits(l *layer, may quota.Limits, storageOpt map[string]string) error {
	want, err := parseStorageOpt(&CreateOpts{StorageOpt: storageOpt}, limits{size: may.Bytes, inodes: may.Inodes})
	if err != nil {
		return err
	}
	// A soft limit that is the hard one, as Docker sets it, means nothing; beside another it would.
	if want.size != may.Bytes && may.SoftBytes == may.Bytes {
		may.SoftBytes = 0
	}
	if want.inodes != may.Inodes && may.SoftInodes == may.Inodes {
		may.SoftInodes = 0
	}
	may.Bytes, may.Inodes = want.size, want.inodes
	if may == (quota.Limits{}) {
		return d.quota.Clear(l.dir())
	}
	return d.quota.Resize(l.dir(), may)
}
