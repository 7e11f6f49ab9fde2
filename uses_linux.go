//go:build linux

package overlay2

import (
	"errors"
	"fmt"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// Processes that share a home know of each other's uses by locks that end with their
// process: each holds LOCK_SH on the diff directory of a layer that it has got. Who can have
// LOCK_EX there is the only user, and what is mounted then is his, or a dead process's.
// The lock of the layer's directory, held for moments, is taken first: so nobody gets a
// layer while another finds out that he is the only one and unmounts it.

// use is a layer's lock of its users.
type use struct{ fd int }

// lockHere locks the layer's directory for writing. If another process has removed the layer
// since it was opened it is ErrLayerNotFound, even if there is a new one of this name.
func (l *layer) lockHere() error {
	if err := sys.Flock(l.fd, unix.LOCK_EX); err != nil {
		return err
	}
	var mine, there unix.Stat_t
	if err := sys.Fstat(l.fd, &mine); err != nil {
		return err
	}
	err := sys.Fstatat(unix.AT_FDCWD, l.home+"/"+l.id, &there)
	if err == unix.ENOENT || err == nil && (mine.Ino != there.Ino || mine.Dev != there.Dev) {
		return ErrLayerNotFound
	}
	return err
}

// gone returns err, or ErrLayerNotFound if the layer was removed by another process meanwhile: then
// that is why something was missing.
func (l *layer) gone(err error) error {
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	var mine, there unix.Stat_t
	if sys.Fstat(l.fd, &mine) != nil {
		return err
	}
	err2 := sys.Fstatat(unix.AT_FDCWD, l.home+"/"+l.id, &there)
	if err2 == unix.ENOENT || err2 == nil && (mine.Ino != there.Ino || mine.Dev != there.Dev) {
		return ErrLayerNotFound
	}
	return err
}

// joinUse counts this process among the users of a layer, until drop. Alone is true if there
// is no other. The layer's directory stays locked until the layer is closed.
func (l *layer) joinUse() (u *use, alone bool, err error) {
	if err := l.lockHere(); err != nil {
		return nil, false, err
	}
	fd, err := sys.OpenDirat(l.fd, diffName)
	if err != nil {
		return nil, false, corrupt("%s: %w", diffName, err)
	}
	u = &use{fd: fd}
	if alone, err = u.alone(); err == nil {
		err = sys.Flock(fd, unix.LOCK_SH)
	}
	if err != nil {
		u.drop()
		return nil, false, err
	}
	return u, alone, nil
}

// alone reports whether nobody else uses the layer; if so, nobody does until the layer's
// directory is unlocked, which the caller has locked.
func (u *use) alone() (bool, error) {
	err := sys.Flock(u.fd, unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		// The lock that was held is gone with the attempt.
		return false, sys.Flock(u.fd, unix.LOCK_SH)
	}
	return err == nil, err
}

// drop ends the use.
func (u *use) drop() {
	if u != nil {
		_ = sys.Close(u.fd) // opened for reading: nothing can be lost
	}
}

// checkUnused returns ErrLayerInUse if another process uses the layer, whose directory the
// caller has locked for writing.
func (l *layer) checkUnused() error {
	fd, err := sys.OpenDirat(l.fd, diffName)
	if exhausted(err) {
		return fmt.Errorf("%s: %w", diffName, err)
	}
	if err != nil {
		return nil //nolint:nilerr // what is damaged nobody can get
	}
	err = sys.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		err = fmt.Errorf("%w: by another process", ErrLayerInUse)
	}
	return errors.Join(err, sys.Close(fd))
}

// endUse is called when the last use of this process ends. It calls unmount if no other
// process uses the layer, and keeps the use if that fails.
func (d *Driver) endUse(id string, state *layerState, unmount func() error) error {
	l, err := openLayer(d.home, id)
	if err != nil {
		return err
	}
	defer l.close()
	if err := sys.Flock(l.fd, unix.LOCK_EX); err != nil {
		return err
	}
	alone := true
	if state.use != nil {
		if alone, err = state.use.alone(); err != nil {
			return err
		}
	} else if err := l.checkUnused(); errors.Is(err, ErrLayerInUse) {
		alone = false
	} else if err != nil {
		return err
	}
	if alone {
		if err := unmount(); err != nil {
			if state.use != nil {
				err = errors.Join(err, sys.Flock(state.use.fd, unix.LOCK_SH))
			}
			return err
		}
	}
	state.use.drop()
	state.use, state.mounts = nil, 0
	return nil
}

// handOver ends the uses of this process as its end would: what is mounted stays mounted, for
// whoever gets or puts it next.
func (d *Driver) handOver() {
	for _, id := range d.layers.ids() {
		state, unlock := d.layers.lock(id)
		state.use.drop()
		state.use = nil
		unlock()
	}
}
