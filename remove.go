//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// Remove removes a layer; that there is none is no error. A layer that is mounted, read
// by an open Diff, or has children is ErrLayerInUse.
//
// The layer is gone when Remove returns; its files are deleted in the background.
// Cleanup waits for that, and New goes on with it after a crash.
func (d *Driver) Remove(id string) error { return layerErr("remove", id, d.remove(id)) }

func (d *Driver) remove(id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	state, unlock := d.layers.lock(id)
	defer unlock()
	l, err := openLayer(d.home, id)
	if errors.Is(err, ErrLayerNotFound) {
		d.dropKept(d.kept.forget(id))
		if err := d.endUses(state); !errors.Is(err, ErrLayerInUse) { // what is out of sight was not to be removed
			return err
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer l.close()
	if err := d.checkUses(l, state); err != nil {
		return err
	}
	if state.mounts > 0 {
		return fmt.Errorf("%w: mounted", ErrLayerInUse)
	}
	// Another process that is making a child holds the lock shared, for moments.
	if err := l.lockHere(); errors.Is(err, ErrLayerNotFound) {
		d.dropKept(d.kept.forget(id))
		return nil // another process was quicker
	} else if err != nil {
		return err
	}
	unread, err := l.refuseOthers()
	if err != nil {
		return err
	}
	defer unread.drop()
	s, err := d.openStaging()
	if err != nil {
		return err
	}
	defer s.close()
	links, err := s.ownLinks(l)
	if err != nil {
		return err
	}
	if err := d.checkChildless(s, l, links); err != nil {
		return err
	}
	return d.removeUnused(l, s, links)
}

// removeUnused removes a layer that nobody uses.
func (d *Driver) removeUnused(l *layer, s *staging, links []string) error {
	if mounted, err := l.mounted(); mounted || err != nil {
		// Left by a process that is no more. What is no directory is just deleted.
		if err := retryBusy(func() error { return unmountGone(l.path(mergedName)) }); err != nil {
			return err
		}
	}
	var trashName string
	if err := retryBusy(func() (err error) {
		trashName, err = d.discard(s, s.homefd, l.id, trashPrefix)
		return err
	}); err != nil {
		return err
	}
	d.volatile.drop(l.id)
	d.dropKept(d.kept.forget(l.id))
	item := trashItem{name: trashName, unlinked: len(links) > 0}
	for _, link := range links {
		d.sizes.Delete(link)
		d.known.forget(link)
		if err := s.unlist(l.fd, link, l.id); err != nil {
			d.log.WithError(err).WithField("layer", l.id).Debug("overlay2: it stays in the list of its parent's children")
		}
		// The layer is gone. If its link stays it is removed before the files are deleted, which
		// say what it is, in the background or by the next New.
		if s.removeDangling(link) != nil {
			item.unlinked = false
		}
	}
	d.trash.addItems(d, item)
	if d.opts.Durability == DurabilityStrict {
		return d.synced(sys.Fsync(s.homefd))
	}
	return nil
}

// retryBusy calls f again, for half a second at most, while something is briefly busy:
// an unmount in another mount namespace that has not ended yet.
func retryBusy(f func() error) error { return retryWhile(unix.EBUSY, busyWait, f) }

const (
	// busyWait is the longest of the waits for what should not be in use, half a second together.
	busyWait = 256 * time.Millisecond
	// forkWait is that for what others may well use, but which a child of this process, between fork and exec, may just
	// have a copy of.
	forkWait = 32 * time.Millisecond
)

// retryWhile calls f again while it returns this error, after waits that double up to the longest.
func retryWhile(again error, longest time.Duration, f func() error) error {
	for wait := time.Millisecond; ; wait *= 2 {
		err := f()
		if !errors.Is(err, again) || wait > longest {
			return err
		}
		time.Sleep(wait)
	}
}
