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
//
// Who reads a layer's files, an open Diff or a view, holds LOCK_SH on its link file instead: he
// neither has it mounted nor keeps anybody from mounting it, but it must not be removed or filled.

// use is a lock of those who use a layer, or read it.
type use struct {
	fd   int
	kept bool // it stays open; see keptLayer
}

// lockHere locks the layer's directory for writing. If another process has removed the layer
// since it was opened it is ErrLayerNotFound, even if there is a new one of this name.
func (l *layer) lockHere() error {
	if err := sys.Flock(l.fd, unix.LOCK_EX); err != nil {
		return err
	}
	return l.checkHere()
}

// checkHere returns ErrLayerNotFound if the layer was removed since it was opened.
func (l *layer) checkHere() error {
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
	if errors.Is(err, unix.ENOENT) && errors.Is(l.checkHere(), ErrLayerNotFound) {
		return ErrLayerNotFound
	}
	return err
}

// joinReaders keeps the layer from being removed, and from being filled, until drop. It waits for who is
// about to do either: whether the layer is whole is to be asked afterwards.
func (l *layer) joinReaders() (*use, error) {
	fd, err := l.openLink()
	if err != nil {
		return nil, corrupt("%s: %w", linkName, err)
	}
	u := &use{fd: fd}
	if err := errors.Join(sys.Flock(fd, unix.LOCK_SH), l.checkHere()); err != nil {
		u.drop()
		return nil, err
	}
	return u, nil
}

// refuseReaders returns ErrLayerInUse if somebody reads the layer, in this process too. Until drop
// nobody begins to.
func (l *layer) refuseReaders() (*use, error) {
	fd, err := l.openLink()
	if exhausted(err) {
		return nil, fmt.Errorf("%s: %w", linkName, err)
	}
	if err != nil {
		return nil, nil //nolint:nilerr // what is damaged nobody can read
	}
	u := &use{fd: fd}
	if err := sys.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		u.drop()
		if err == unix.EWOULDBLOCK {
			err = fmt.Errorf("%w: a diff or a view of it is open", ErrLayerInUse)
		}
		return nil, err
	}
	return u, nil
}

// refuseOthers returns ErrLayerInUse if another process uses the layer, whose directory the caller has locked for
// writing, or if somebody reads it. Until drop nobody begins to read.
func (l *layer) refuseOthers() (*use, error) {
	if err := l.checkUnused(); err != nil {
		return nil, err
	}
	return l.refuseReaders()
}

// openLink opens the layer's link file for a lock, whatever it is.
func (l *layer) openLink() (int, error) {
	return sys.Openat(l.fd, linkName, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
}

// joinUse counts this process among the users of a layer, until drop. The layer's directory stays locked until the layer is closed.
func (l *layer) joinUse() (*use, error) {
	if err := l.lockHere(); err != nil {
		return nil, err
	}
	fd, err := sys.OpenDirat(l.fd, diffName)
	if err != nil {
		return nil, corrupt("%s: %w", diffName, err)
	}
	u := &use{fd: fd}
	if err := sys.Flock(fd, unix.LOCK_SH); err != nil {
		u.drop()
		return nil, err
	}
	return u, nil
}

// only reports whether nobody else uses the layer, whose directory the caller has locked. The use stays.
func (u *use) only() (bool, error) {
	alone, err := u.alone()
	if alone {
		err = sys.Flock(u.fd, unix.LOCK_SH)
	}
	return alone, err
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

// drop ends the use. More than the descriptor has to go: a child between fork and exec has a copy, which would
// keep the lock for as long.
func (u *use) drop() {
	if u == nil {
		return
	}
	if err := sys.Flock(u.fd, unix.LOCK_UN); err == nil && u.kept {
		return
	}
	_ = sys.Close(u.fd) // opened for reading: nothing can be lost
	u.kept, u.fd = false, -1
}

// checkUnused returns ErrLayerInUse if another process uses the layer, whose directory the
// caller has locked for writing.
func (l *layer) checkUnused() error {
	fd, err := sys.OpenDirat(l.fd, diffName)
	if exhausted(err) {
		return fmt.Errorf("%s: %w", diffName, err)
	}
	if err != nil {
		return nil // what is damaged nobody can get
	}
	defer (&use{fd: fd}).drop()
	err = sys.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		err = fmt.Errorf("%w: by another process", ErrLayerInUse)
	}
	return err
}

// endUse is called when the last use of this process ends. It calls unmount if no other
// process uses the layer, and keeps the use if that fails, unless the layer is not there any more.
func (l *layer) endUse(state *layerState, unmount func() error) (err error) {
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
		if err = unmount(); err != nil && !errors.Is(err, ErrLayerNotFound) {
			if state.use != nil {
				err = errors.Join(err, sys.Flock(state.use.fd, unix.LOCK_SH))
			}
			return err
		}
	}
	state.use.drop()
	state.use, state.mounts = nil, 0
	return err
}

// checkUses ends the uses that are counted if they are of another layer than l, one that was removed by others and had its
// name. If that is still there, out of sight, it is ErrLayerInUse: its Puts are to come first.
func (d *Driver) checkUses(l *layer, state *layerState) error {
	if state.mounts == 0 {
		return nil
	}
	used := state.handed
	if state.use != nil {
		st, err := sys.StatDir(state.use.fd, "")
		if err != nil {
			return err
		}
		used = st.Ident
	}
	now, err := sys.StatDir(l.fd, diffName)
	if err != nil || now.Ident.SameFile(used) {
		return nil //nolint:nilerr // what is damaged the caller sees
	}
	return d.endUses(state)
}

// endUses ends the uses that are counted of a layer that is not at its place. If it is elsewhere it is ErrLayerInUse.
func (d *Driver) endUses(state *layerState) error {
	if state.use != nil {
		if _, err := sys.StateFd(state.use.fd); err != unix.ENOENT {
			return errors.Join(err, fmt.Errorf("%w: another layer of this name, out of sight", ErrLayerInUse))
		}
	}
	d.giveUp(state)
	state.mounts = 0
	return nil
}

// giveUp ends the use of a layer, as the end of the process would.
func (d *Driver) giveUp(state *layerState) {
	if state.kept != nil {
		d.dropKept(state.kept)
	} else {
		state.use.drop()
	}
	state.use, state.kept = nil, nil
}

// handOver ends the uses of this process as its end would, but for their number: what is mounted stays mounted, for
// whoever gets or puts it next.
func (d *Driver) handOver() {
	for _, id := range d.layers.ids() {
		state, unlock := d.layers.lock(id)
		if state.use != nil {
			st, _ := sys.StatDir(state.use.fd, "") // without, the uses are taken for none
			state.handed = st.Ident
		}
		d.giveUp(state)
		unlock()
	}
}
