//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Get returns the host path at which the layer's tree can be used, and counts the use:
// each Get needs a Put. A layer without children can be written through it; a committed
// one is read-only. mountLabel is the SELinux label of the mount, or "".
//
// A read-write layer without a parent is not mounted: the path is its diff directory.
// A mount of the layer that a former process left is adopted and counts as one use. One of
// another process that lives is shared: the last of them unmounts it.
func (d *Driver) Get(id, mountLabel string) (string, error) {
	path, err := d.get(id, mountLabel)
	return path, layerErr("get", id, err)
}

func (d *Driver) get(id, mountLabel string) (_ string, err error) {
	return d.getWith(id, MountOpts{Label: mountLabel})
}

func (d *Driver) getWith(id string, opts MountOpts) (string, error) {
	if err := errors.Join(checkMountLabel(opts.Label), d.checkMap(opts.IDMap)); err != nil {
		return "", err
	}
	if err := checkID(id); err != nil {
		return "", err
	}
	state, unlock := d.layers.lock(id)
	defer unlock()
	if path, ok, err := d.getKept(id, state, opts); ok || err != nil {
		return path, err
	}
	l, err := openLayer(d.home, id)
	if err != nil {
		return "", err
	}
	defer l.close()
	defer func() { err = l.gone(err) }()
	if err := l.checkWhole(); err != nil {
		return "", err
	}
	if err := d.checkUses(l, state); err != nil {
		return "", err
	}
	joined := state.use == nil
	if joined {
		if err := d.joinLayer(l, state); err != nil {
			return "", err
		}
	}
	path, adopted, err := d.mountLayer(l, state, opts)
	if adopted && joined && err == nil {
		adopted, err = state.use.only() // else it is another's, who has counted it
	}
	if k := state.kept; k != nil && joined && (err != nil || !d.keep(k, l, state.use)) {
		d.dropKept(k)
		state.kept = nil
	}
	if err != nil {
		if state.mounts == 0 {
			state.use.drop()
			state.use = nil
		}
		return "", err
	}
	if adopted && joined && state.mounts == 0 {
		state.mounts++
	}
	state.mounts++
	state.plain = path == l.path(diffName)
	return path, nil
}

// joinLayer begins a use of the layer, and to keep it if that is worth it.
func (d *Driver) joinLayer(l *layer, state *layerState) (err error) {
	if state.use, err = l.joinUse(); err != nil || state.mounts > 0 {
		return err
	}
	if state.kept = d.beginKeeping(l); state.kept == nil {
		return nil
	}
	if err = l.checkWhole(); err != nil { // again, since it is watched
		d.dropKept(state.kept)
		state.use.drop()
		state.kept, state.use = nil, nil
	}
	return err
}

// mountLayer mounts an open layer that has been got so many times before, if it needs
// that, and returns the path. The layer's lock is held.
func (d *Driver) mountLayer(l *layer, state *layerState, opts MountOpts) (path string, adopted bool, err error) {
	if state.mounts > 0 {
		if err := state.checkOwners(opts.IDMap); err != nil {
			return "", false, err
		}
		if state.plain {
			return l.path(diffName), false, nil
		}
		if mounted, err := l.mounted(); err != nil || mounted {
			return l.path(mergedName), false, err
		}
		// Somebody else has unmounted it. The uses that are counted go on with a new mount.
		if err := sys.Flock(l.fd, unix.LOCK_EX); err != nil {
			return "", false, err
		}
	}
	state.owners = opts.IDMap
	lower, err := l.readLower()
	if err != nil {
		return "", false, err
	}
	committed, err := l.has(committedName)
	if err != nil {
		return "", false, err
	}
	if lower == "" {
		if err := l.checkDiff(); err != nil {
			return "", false, err
		}
		if !committed && opts.IDMap.Empty() {
			return l.path(diffName), false, l.checkPlain()
		}
		adopted, err = d.mountAtMerged(l, opts.IDMap, func() error {
			if !opts.IDMap.Empty() {
				return d.bindMapped(l, opts.IDMap, committed)
			}
			// Overlayfs takes no single layer without an upper one.
			return sys.BindReadOnly(l.path(diffName), l.path(mergedName))
		})
		return l.path(mergedName), adopted, err
	}
	if !committed && opts.IDMap.Empty() {
		adopted, ready, err := d.mountAsBefore(l, lower, state.kept, opts)
		if ready || err != nil {
			return l.path(mergedName), adopted, err
		}
	}
	links, err := parseLower(lower)
	if err != nil {
		return "", false, err
	}
	spec, err := d.mountSpec(l, links, committed)
	if err != nil {
		return "", false, err
	}
	defer spec.chain.close()
	spec.label, spec.lower = opts.Label, lower
	adopted, err = d.mountAtMerged(l, opts.IDMap, func() error { return d.mountOverlay(l, spec, opts.IDMap) })
	return l.path(mergedName), adopted, err
}

// mountAsBefore mounts a layer to be written whose lower layers are ready. It returns false if they are not, and nothing
// is mounted then. What is kept of the layer, unless it is nil, is found out.
func (d *Driver) mountAsBefore(l *layer, lower string, kept *keptLayer, opts MountOpts) (adopted, ready bool, err error) {
	spec, ready, err := d.readySpec(l, lower, opts.Label, kept)
	if !ready || err != nil {
		return false, false, err
	}
	defer d.known.releaseReady(spec.ready)
	adopted, err = d.mountAtMerged(l, opts.IDMap, func() error { return d.mountOverlay(l, spec, opts.IDMap) })
	if errors.Is(err, errNotReady) {
		d.known.forgetReady()
		return false, false, nil
	}
	if kept == nil && err == nil {
		d.kept.seen(l.id)
	}
	return adopted, true, err
}

// mountAtMerged makes the layer's merged directory and calls mount, unless something is
// mounted there already.
func (d *Driver) mountAtMerged(l *layer, owners archive.IDMap, mount func() error) (adopted bool, err error) {
	if adopted, err = d.makeMerged(l); err != nil || adopted {
		if adopted && err == nil {
			err = errors.Join(l.checkMerged(owners), d.adoptVolatile(l))
		}
		return adopted, err
	}
	if err := mount(); err != nil {
		return false, errors.Join(err, unix.Rmdir(l.path(mergedName)))
	}
	return false, nil
}

// mountSpec returns the overlay of a layer with ancestors. Mounting checks those. The caller
// closes the chain.
func (d *Driver) mountSpec(l *layer, links []string, readOnly bool) (_ mountSpec, err error) {
	own, err := l.link()
	if err != nil {
		return mountSpec{}, err
	}
	links = append([]string{own}, links...)
	c, err := d.openChain(links)
	if err != nil {
		return mountSpec{}, err
	}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := c.checkOwn(l); err != nil {
		return mountSpec{}, err
	}
	if readOnly {
		return mountSpec{home: d.home, dir: linkPrefix, lowers: links, chain: c, options: d.mountOptions}, nil
	}
	spec := d.writableSpec(c, own)
	spec.lowers = links[1:]
	return spec, d.checkWork(l)
}

// writableSpec returns the overlay of a layer to be written, without its lower layers.
func (d *Driver) writableSpec(c *chain, own string) mountSpec {
	// Through the link, so that neither the length nor the characters of the ID matter.
	upper := linkPrefix + own
	return mountSpec{home: d.home, dir: linkPrefix, chain: c, options: d.mountOptions, upper: upper, work: upper + "/../" + workName}
}

// makeMerged makes the mount point. If it is there and something is mounted on it,
// a process that is no more has left it, or another one that lives: mounted is true.
func (d *Driver) makeMerged(l *layer) (mounted bool, err error) {
	// Whatever the umask makes of the mode: the mount covers it.
	switch err := sys.MkdiratMasked(l.fd, mergedName, 0o700); {
	case err == nil:
		return false, d.chownRoot(l.fd, mergedName)
	case errors.Is(err, fs.ErrExist):
		return l.mounted()
	default:
		return false, fmt.Errorf("%s: %w", mergedName, err)
	}
}

// mounted reports whether something is mounted at the layer's merged. It must be a directory if it is there.
func (l *layer) mounted() (bool, error) {
	switch err := sys.IsDirat(l.fd, mergedName); {
	case err == unix.ENOENT:
		return false, nil
	case err != nil:
		return false, corrupt("%s: %w", mergedName, err)
	}
	mounted, err := mountinfo.Mounted(l.path(mergedName))
	return mounted, ignoreAbsent(err) // another process has just put it
}

// mountOverlay mounts the layer at its merged directory.
func (d *Driver) mountOverlay(l *layer, spec mountSpec, owners archive.IDMap) error {
	mount := func() error { return spec.mount(l.id+"/"+mergedName, d.opts.MountMethod, d.facts) }
	if !owners.Empty() {
		mount = func() error { return d.mountMapped(l, spec, owners) }
	}
	if spec.upper == "" {
		return mount()
	}
	if err := d.mountVolatile(l, mount); err != nil {
		return err
	}
	return d.chownWork(l)
}

// checkWork makes sure that the work directory is one: the kernel empties it. One that is
// missing is made, as a home that was copied without it is whole all the same.
func (d *Driver) checkWork(l *layer) error {
	switch err := sys.IsDirat(l.fd, workName); err {
	case nil:
		return nil
	case unix.ENOENT:
		if err := sys.Mkdirat(l.fd, workName, 0o700); err != nil {
			return fmt.Errorf("%s: %w", workName, err)
		}
		return d.chownRoot(l.fd, workName)
	default:
		return corrupt("%s: %w", workName, err)
	}
}

// chownWork gives work/work, which the kernel has made, to the remapped root.
func (d *Driver) chownWork(l *layer) error {
	if d.rootUID == 0 && d.rootGID == 0 {
		return nil
	}
	fd, err := sys.OpenDirat(l.fd, workName)
	if err == nil {
		err = errors.Join(d.chownRoot(fd, workName), sys.Close(fd))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("%s/%s: %w", workName, workName, err), sys.Unmount(l.path(mergedName)))
	}
	return nil
}

// Put gives back one use of the layer; the last one unmounts it. Put of a mount that a
// former process left unmounts it; with nothing to give back it is ErrNotMounted.
// If the unmount does not succeed the use stays counted, and Put can be called again.
func (d *Driver) Put(id string) error { return layerErr("put", id, d.put(id)) }

func (d *Driver) put(id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	state, unlock := d.layers.lock(id)
	defer unlock()
	if ok, err := d.putKept(state); ok {
		return err
	}
	if state.mounts > 1 {
		state.mounts--
		return nil
	}
	l, err := d.openUsed(id, state)
	if err != nil {
		return err
	}
	defer l.close()
	if state.mounts == 0 {
		if err := d.checkMounted(l); err != nil {
			return err
		}
	}
	return l.endUse(state, func() error { return d.unmountMerged(l) })
}

// checkMounted returns ErrNotMounted unless something is mounted at the layer's merged, as a
// process that is no more has left it. The layer's directory is locked for writing then.
func (d *Driver) checkMounted(l *layer) error {
	mounted, err := l.mounted()
	switch {
	case err != nil:
		return err
	case !mounted:
		return ErrNotMounted
	}
	if err := sys.Flock(l.fd, unix.LOCK_EX); err != nil {
		return err
	}
	if err := l.checkUnused(); errors.Is(err, ErrLayerInUse) {
		return fmt.Errorf("%w by this process", ErrNotMounted)
	} else if err != nil {
		return err
	}
	return d.adoptVolatile(l)
}

// openUsed opens the layer whose last use is to end: the very one that was got, whatever has its name now.
func (d *Driver) openUsed(id string, state *layerState) (*layer, error) {
	if state.use != nil {
		fd, err := sys.OpenDirat(state.use.fd, "..")
		if err != nil {
			return nil, err
		}
		return &layer{home: d.home, id: id, fd: fd}, nil
	}
	l, err := openLayer(d.home, id)
	if err != nil {
		return nil, err
	}
	if err := d.checkUses(l, state); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// unmountMerged detaches the mount at the layer's merged, if there is one, and removes
// the directory, which also detaches it in other mount namespaces (3.18, commit 8ed936b5671b).
// If the layer is not there any more it is ErrLayerNotFound: nothing is mounted then.
func (d *Driver) unmountMerged(l *layer) error {
	// By the directory that is open: another layer may have its name, or another home lie over this one.
	path := l.path(mergedName)
	err := sys.UnmountAt(l.fd, mergedName, path)
	if isGone(err) {
		// Nor is there a mount at the path, unless another mount of this home lies over the one that the directory
		// was opened on, or there is no /proc.
		if err := l.checkHere(); err != nil {
			return err
		}
		err = unmountGone(path)
	}
	if err != nil {
		return err
	}
	// Not a reason to keep the layer counted: the mount is gone. Get takes the directory as it is.
	if err := sys.Unlinkat(l.fd, mergedName, unix.AT_REMOVEDIR); err != nil && err != unix.ENOENT {
		d.log.WithError(err).WithField("path", path).Debug("overlay2: mount point stays")
	}
	return nil
}
