//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"slices"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// lowerNew is the next lower file of a layer that is being rebased. It is made in the layer's directory
// because a layer with a project of its own takes nothing from elsewhere.
const lowerNew = lowerName + newSuffix

// Rebase puts a layer that has a parent over another one, with one rename. What is in the layer stays as it
// is: its files, marks and root directory are laid over the new chain as they were over the old one. That is for
// layers of an image that are filled at the same time, each over an empty layer, and then put over each other, as
// containerd's snapshots.WithParent asks for. On the disk it is when Rebase returns, but with DurabilityOff.
//
// Errors: ErrLayerNotFound for either of them; ErrLayerInUse for a layer that is mounted, read or has
// children; ErrInvalidOption for no parent, or for a base layer, whose content was made with nothing below and holds
// no marks; ErrTooDeep; ErrIncomplete.
func (d *Driver) Rebase(id, parent string) error {
	return layerErr("rebase", id, d.rebase(id, parent))
}

func (d *Driver) rebase(id, parent string) error {
	if err := checkID(id); err != nil {
		return err
	}
	if parent == "" {
		return fmt.Errorf("%w: no parent", ErrInvalidOption)
	}
	if parent == id {
		return fmt.Errorf("%w: a layer cannot be its own parent", ErrInvalidID)
	}
	// The note of a layer that is not on the disk yet names its parent: after a power cut the old one
	// would be taken for right.
	if d.opts.Durability != DurabilityOff {
		if err := d.flush(false); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
	}
	state, unlock := d.layers.lockChild(id, parent)
	defer unlock()
	s, err := d.openStaging()
	if err != nil {
		return err
	}
	defer s.close()
	l, err := openLayer(d.home, id)
	if err != nil {
		return err
	}
	defer l.close()
	p, err := d.openParent(parent)
	if err != nil {
		return fmt.Errorf("parent %s: %w", parent, err)
	}
	defer p.close()
	links, err := d.parentChain(s, p)
	if err != nil {
		return fmt.Errorf("parent %s: %w", parent, p.gone(err))
	}
	if err := d.checkUses(l, state); err != nil {
		return err
	}
	unread, err := l.lockRebase(state)
	if err != nil {
		return err
	}
	defer unread.drop()
	own, err := s.ownLinks(l)
	if err != nil {
		return err
	}
	if err := d.checkChildless(s, l, own); err != nil {
		return err
	}
	return d.setLowers(s, l, p, links)
}

// lockRebase locks the layer, until it is closed and the use is dropped, against all who use it. That somebody does
// is ErrLayerInUse.
func (l *layer) lockRebase(state *layerState) (*use, error) {
	if state.mounts > 0 {
		return nil, fmt.Errorf("%w: mounted", ErrLayerInUse)
	}
	// Not awaited for long: the parent is locked, and whoever has this layer may wait for that. But a child of this
	// process, between fork and exec, may have a copy of the descriptor that a call before locked it by.
	if err := retryWhile(unix.EWOULDBLOCK, busyWait, func() error { return sys.Flock(l.fd, unix.LOCK_EX|unix.LOCK_NB) }); err == unix.EWOULDBLOCK {
		return nil, fmt.Errorf("%w: by another process", ErrLayerInUse)
	} else if err != nil {
		return nil, err
	}
	if err := errors.Join(l.checkHere(), l.checkWhole()); err != nil {
		return nil, err
	}
	if mounted, err := l.mounted(); err != nil {
		return nil, err
	} else if mounted {
		return nil, fmt.Errorf("%w: mounted by a process that is no more", ErrLayerInUse)
	}
	return l.refuseOthers()
}

// setLowers replaces the lower file of a layer that nobody uses.
func (d *Driver) setLowers(s *staging, l, parent *layer, links []string) error {
	old, err := l.lowers()
	switch {
	case err != nil:
		return err
	case len(old) == 0:
		return fmt.Errorf("%w: a base layer cannot get a parent", ErrInvalidOption)
	case slices.Equal(old, links):
		return nil
	}
	own, err := l.link()
	if err != nil {
		return err
	}
	if err := d.enlist(parent, own, l.id); err != nil {
		return fmt.Errorf("parent %s: %w", parent.id, err)
	}
	if err := ignoreAbsent(sys.Unlinkat(l.fd, lowerNew, 0)); err != nil {
		return fmt.Errorf("%s: %w", lowerNew, err)
	}
	err = sys.WriteFileAt(l.fd, lowerNew, []byte(encodeLower(links)), 0o644)
	if err == nil {
		err = d.syncFile(l.fd, lowerNew)
	}
	if err == nil {
		err = unix.Renameat(l.fd, lowerNew, l.fd, lowerName)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("%s: %w", lowerNew, err), ignoreAbsent(sys.Unlinkat(l.fd, lowerNew, 0)), parent.unlistFrom(own, l.id))
	}
	d.sizes.Delete(own)
	if err := s.unlistOf(old[0], own, l.id); err != nil {
		d.log.WithError(err).WithField("layer", l.id).Debug("overlay2: it stays in the list of its former parent's children")
	}
	if d.opts.Durability == DurabilityOff {
		return nil
	}
	if err := d.synced(sys.Fsync(l.fd)); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

// syncFile brings the content of a file to the disk.
func (d *Driver) syncFile(dirfd int, name string) error {
	if d.opts.Durability == DurabilityOff {
		return nil
	}
	fd, err := sys.Openat(dirfd, name, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(d.synced(sys.Fdatasync(fd)), sys.Close(fd))
}
