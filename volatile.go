//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"sync"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// volatileMark is what the kernel makes in a layer that it mounts with the option volatile
// (5.10, commit c86243b090bc), and never removes: as long as it is there nobody can know whether what was
// written has reached the disk, and the kernel refuses to mount the layer again.
const volatileMark = workName + "/work/incompat/volatile"

// volatileLayers are those that this Driver has mounted with the option volatile, or found
// so mounted: since then the machine has not crashed, so that they hold what was written.
type volatileLayers struct {
	mu  sync.Mutex
	ids map[string]struct{}
}

func (v *volatileLayers) add(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ids == nil {
		v.ids = make(map[string]struct{})
	}
	v.ids[id] = struct{}{}
}

func (v *volatileLayers) has(id string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, ok := v.ids[id]
	return ok
}

func (v *volatileLayers) drop(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.ids, id)
}

// checkSynced returns ErrUnsynced if the layer was mounted with volatile, and not by this
// Driver: its content may be what a crash left of it.
func (d *Driver) checkSynced(l *layer) error {
	if d.volatile.has(l.id) {
		return nil
	}
	marked, err := l.has(volatileMark)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EACCES) {
		return nil
	}
	if err != nil || !marked {
		return err
	}
	return unsynced()
}

func unsynced() error { return fmt.Errorf("%w: ResetVolatile accepts what is there", ErrUnsynced) }

// ResetVolatile accepts the content of a layer that is ErrUnsynced as it is. That is for a
// caller who knows that the machine has not crashed since the layer was written, or who has looked. A
// layer that is mounted is ErrLayerInUse; for one that is in order nothing is done.
func (d *Driver) ResetVolatile(id string) error { return layerErr("reset", id, d.resetVolatile(id)) }

func (d *Driver) resetVolatile(id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	state, unlock := d.layers.lock(id)
	defer unlock()
	l, err := openLayer(d.home, id)
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
	// Until the layer is closed nobody else mounts it.
	if err := errors.Join(l.lockHere(), l.checkUnused()); err != nil {
		return err
	}
	if mounted, err := l.mounted(); err != nil {
		return err
	} else if mounted {
		return fmt.Errorf("%w: mounted", ErrLayerInUse)
	}
	if _, err := l.unmarkVolatile(); err != nil {
		return err
	}
	d.volatile.drop(id)
	return nil
}

// unmarkVolatile removes the kernel's mark, if there is one.
func (l *layer) unmarkVolatile() (marked bool, err error) {
	fd, err := sys.OpenBeneath(l.fd, workName+"/work")
	if err == unix.ENOENT {
		return false, nil
	}
	if err != nil {
		return false, corrupt("%s/work: %w", workName, err)
	}
	var st unix.Stat_t
	marked = sys.Fstatat(fd, "incompat/volatile", &st) == nil
	return marked, errors.Join(sys.RemoveAllAt(fd, "incompat"), sys.Close(fd))
}

// markVolatile makes the mark again that unmarkVolatile removed.
func (l *layer) markVolatile() error {
	fd, err := sys.OpenBeneath(l.fd, workName)
	if err != nil {
		return corrupt("%s: %w", workName, err)
	}
	for _, name := range []string{"work", "work/incompat", "work/incompat/volatile"} {
		if err = sys.Mkdirat(fd, name, 0o700); err != nil && err != unix.EEXIST {
			break
		}
		err = nil
	}
	return errors.Join(err, sys.Close(fd))
}

// adoptVolatile takes over a layer that is mounted: if it is marked then by that very mount.
func (d *Driver) adoptVolatile(l *layer) error {
	marked, err := l.has(volatileMark)
	if marked {
		d.volatile.add(l.id)
	}
	if errors.Is(err, unix.ENOTDIR) {
		return nil // a layer without a work directory
	}
	return err
}

// mountVolatile calls mount for a layer that may be marked. Another Driver's mark is ErrUnsynced.
func (d *Driver) mountVolatile(l *layer, mount func() error) error {
	marked := false
	if d.volatile.has(l.id) {
		var err error
		if marked, err = l.unmarkVolatile(); err != nil {
			return err
		}
	}
	err := mount()
	if err != nil && marked {
		// What was written is no more on the disk than before. A kill or a power cut in the moment between is not noticed.
		return errors.Join(err, l.markVolatile())
	}
	switch {
	case errors.Is(err, unix.EINVAL): // the kernel's answer to a mark
		return errors.Join(d.checkSynced(l), err)
	case err == nil && hasOption(d.mountOptions, "volatile"):
		d.volatile.add(l.id)
	}
	return err
}
