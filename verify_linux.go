//go:build linux

package overlay2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// newDigestsName is the name of digests that are being written.
const newDigestsName = digestsName + newSuffix

// RecordDigests reads the layer and records a digest of each of its files, for Verify, in place of what was
// recorded before. With Options.RecordDigests ApplyDiff and ApplyLayers do it by themselves, unless the holes are too large.
// A layer that is mounted for writing is ErrLayerInUse. It costs reading the layer, holes of sparse files too; memory is that for the names of the
// longest directory and for hard links. Other calls on the layer wait. It ends early with the error of ctx, and what was recorded
// before stays.
func (d *Driver) RecordDigests(ctx context.Context, id string) error {
	return layerErr("record digests", id, d.recordLayer(ctx, id))
}

func (d *Driver) recordLayer(ctx context.Context, id string) (err error) {
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
	defer func() { err = l.gone(err) }()
	if err := l.lockHere(); err != nil {
		return err
	}
	if err := errors.Join(l.checkWhole(), d.checkSynced(l), d.checkUses(l, state)); err != nil {
		return err
	}
	committed, err := l.has(committedName)
	if err != nil {
		return err
	}
	if !committed {
		mounted, err := l.mounted()
		if err == nil && (mounted || state.mounts > 0) {
			err = fmt.Errorf("%w: mounted for writing", ErrLayerInUse)
		}
		if err = errors.Join(err, l.checkUnused()); err != nil {
			return err
		}
	}
	lowers, err := d.lowerPaths(l)
	if err != nil {
		return err
	}
	return d.recordDigests(ctx, l, lowers, d.opts.Durability != DurabilityOff, math.MaxInt64)
}

// recordApplied records the digests of a layer that was filled, if that is wanted. They reach the disk with the layer. One with
// very large holes is left without: who applies a tar cannot know how long that takes, nor end it.
func (d *Driver) recordApplied(ctx context.Context, l *layer, lowers []string) error {
	if !d.opts.RecordDigests {
		return nil
	}
	err := d.recordDigests(ctx, l, lowers, false, d.maxHoles)
	if errors.Is(err, errManyHoles) {
		d.log.WithField("layer", l.id).WithError(err).Warn("overlay2: no digests recorded: RecordDigests does it, however long it takes")
		return nil
	}
	return err
}

// recordDigests writes the digests of a layer that nobody changes meanwhile. If its holes are longer than holes in all that is errManyHoles.
func (d *Driver) recordDigests(ctx context.Context, l *layer, lowers []string, sync bool, holes int64) error {
	// In the layer's directory, as one with a project of its own takes nothing from elsewhere.
	if err := removeName(l.fd, newDigestsName); err != nil {
		return fmt.Errorf("%s: %w", newDigestsName, err)
	}
	fd, err := sys.Openat(l.fd, newDigestsName, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("%s: %w", newDigestsName, err)
	}
	f := os.NewFile(uintptr(fd), newDigestsName)
	w, err := newDigestWriter(f)
	if err == nil {
		err = d.digestLayer(ctx, l, lowers, holes, w.add)
	}
	if err == nil {
		err = w.end()
	}
	if err == nil && sync {
		err = d.synced(sys.Fsync(fd))
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = replaceName(l.fd, newDigestsName, l.fd, digestsName)
	}
	if err == nil && sync {
		err = d.synced(sys.Fsync(l.fd))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("%s: %w", digestsName, err), removeName(l.fd, newDigestsName))
	}
	return nil
}

// digestLayer calls f with the digest of the layer's root and of each entry of its own tar: of what its diff directory holds.
func (d *Driver) digestLayer(ctx context.Context, l *layer, lowers []string, holes int64, f func(line []byte) error) error {
	s := newDigester()
	s.ended, s.holes = ctx.Err, holes
	pack := func(opts archive.PackOptions, f func(line []byte) error) error {
		r, err := archive.Pack(ctx, l.path(diffName), opts)
		if err != nil {
			return err
		}
		return errors.Join(s.each(r, f), r.Close())
	}
	// A layer's tar has no entry for a root that is like its parent's: so the root comes first, and alone.
	root := []archive.Change{{Path: "/", Kind: archive.Modified}}
	if err := pack(archive.PackOptions{Format: archive.Merged, Changes: root}, f); err != nil {
		return err
	}
	return pack(archive.PackOptions{Format: d.format, Lowers: lowers, AllMarks: true}, func(line []byte) error {
		if s.root {
			return nil
		}
		return f(line)
	})
}

// dropDigests removes the digests of a layer that is going to be changed.
func (l *layer) dropDigests() error {
	if err := removeName(l.fd, digestsName); err != nil {
		return fmt.Errorf("%s: %w", digestsName, err)
	}
	return nil
}

// Verify reads the layer and calls report for each path that is not what was recorded, in the order of the layer's
// tar; never for a layer that is as it was. What was changed through a mount since is reported too. Memory is that for the names
// of the longest directory and for hard links, however large the layer is. The layer cannot be removed meanwhile.
//
// No digests are ErrNoDigests, damaged ones ErrCorrupt: then nothing was compared. A file that cannot be read is the
// error, which names it, and what comes after it has not been looked at. What is written to the layer while Verify reads it
// is reported or not, or such an error. Verify ends early with the error of ctx.
func (d *Driver) Verify(ctx context.Context, id string, report func(Difference)) error {
	return layerErr("verify", id, d.verify(ctx, id, report))
}

func (d *Driver) verify(ctx context.Context, id string, report func(Difference)) (err error) {
	if err := checkID(id); err != nil {
		return err
	}
	l, lowers, closeLayer, err := d.openVerify(id)
	if err != nil {
		return err
	}
	defer closeLayer()
	f, err := l.openDigests()
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // opened for reading: nothing can be lost
	// Once to the end first: nothing is reported by digests that are damaged themselves.
	r, err := newDigestReader(f)
	if err == nil {
		err = r.check(ctx.Err)
	}
	if err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("%s: %w", digestsName, err)
	}
	if r, err = newDigestReader(f); err != nil {
		return err
	}
	c, err := newComparer(r, report)
	if err == nil {
		err = d.digestLayer(ctx, l, lowers, math.MaxInt64, c.add)
	}
	if err != nil {
		return err
	}
	return c.end()
}

// openVerify opens a layer so that it can be neither removed nor filled until closeLayer.
func (d *Driver) openVerify(id string) (_ *layer, lowers []string, closeLayer func(), err error) {
	_, unlock := d.layers.lock(id)
	defer unlock()
	l, err := openLayer(d.home, id)
	if err != nil {
		return nil, nil, nil, err
	}
	reader, err := l.joinReaders()
	if err == nil {
		err = l.checkWhole()
	}
	if err == nil {
		lowers, err = d.lowerPaths(l)
	}
	if err != nil {
		err = l.gone(err)
		reader.drop()
		l.close()
		return nil, nil, nil, err
	}
	return l, lowers, func() {
		reader.drop()
		l.close()
	}, nil
}

// openDigests opens what was recorded of the layer.
func (l *layer) openDigests() (*os.File, error) {
	fd, err := sys.Openat(l.fd, digestsName, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, ErrNoDigests
	case exhausted(err):
		return nil, fmt.Errorf("%s: %w", digestsName, err)
	case err != nil:
		return nil, corrupt("%s: %w", digestsName, err)
	}
	f := os.NewFile(uintptr(fd), digestsName)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(corrupt("%s: %w", digestsName, errors.Join(err, sys.ErrNotRegular)), f.Close())
	}
	return f, nil
}
