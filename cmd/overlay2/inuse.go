//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"golang.org/x/sys/unix"
)

// checkFree returns ErrInUse if one of the layers is mounted or read. It is asked of all layers that are to be removed before
// the first is: what is gone does not come back. With force, those that are mounted are unmounted.
func (a *app) checkFree(d *overlay2.Driver, ids []string, force bool) error {
	points, err := mountPoints()
	if err != nil {
		return err
	}
	var mounted []*store.Layer
	for _, id := range ids {
		if !d.Exists(id) {
			continue
		}
		l, err := a.store.Layer(id)
		if errors.Is(err, store.ErrNotFound) {
			l, err = &store.Layer{ID: id}, nil
		}
		if err != nil {
			return err
		}
		if err := a.checkUnread(id); err != nil {
			return err
		}
		_, was, err := a.mounted(d, id)
		// A layer that is too damaged to say is there to be removed all the same: the driver
		// refuses if it is mounted.
		if err == nil && (was || slices.ContainsFunc(l.Binds, func(at string) bool { return points[at] })) {
			mounted = append(mounted, l)
		}
	}
	for _, l := range mounted {
		if !force {
			return fmt.Errorf("layer %s %w: it is mounted (umount it, or rm -f)", short(l.ID), store.ErrInUse)
		}
		if _, err := a.unmountLayer(d, l); err != nil {
			return err
		}
	}
	return nil
}

// checkUnread returns ErrInUse if a process that lives reads the layer, or has got it: those hold locks that
// docs/format.md names. The driver looks too, but at one layer only, when it removes it.
func (a *app) checkUnread(id string) error {
	for _, name := range []string{"link", "diff"} {
		f, err := os.OpenFile(filepath.Join(a.store.Home(), id, name), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) {
			continue // what is damaged nobody can use
		}
		if err != nil {
			return err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("layer %s %w: another process reads or uses it", short(id), store.ErrInUse)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}
