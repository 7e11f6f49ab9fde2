//go:build linux

package overlay2

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// What an incomplete marker leads to: whether the layer had content before the apply that
// did not end well. Without, the next apply starts from an empty layer.
const (
	incompleteEmpty   = "empty"
	incompleteContent = "content"
)

// ApplyDiff unpacks a tar, not compressed, into the layer, and returns the size of the
// layer's content in bytes, as DiffSize would. The stream is read to its end; whiteouts
// (".wh.NAME", ".wh..wh..opq") hide what the parents have.
//
// If it does not end well the error names the entry, and the layer is ErrIncomplete
// for every other call until it is removed or a diff is applied to it again; after a
// crash too. Devices that a user namespace may not make are left out, and logged: the layer is whole without
// them. A layer with children, an open Diff or a view is ErrLayerInUse. One that this Driver has mounted is filled through
// the mount: who reads it there meanwhile sees it grow.
func (d *Driver) ApplyDiff(id, parent string, diff io.Reader) (int64, error) {
	size, err := d.applyDiff(id, parent, diff)
	return size, layerErr("apply", id, err)
}

func (d *Driver) applyDiff(id, parent string, diff io.Reader) (_ int64, err error) {
	if err := checkID(id); err != nil {
		return 0, err
	}
	state, unlock := d.layers.lockChild(id, parent)
	defer unlock()
	l, err := openLayer(d.home, id)
	if err != nil {
		return 0, err
	}
	defer l.close()
	defer func() { err = l.gone(err) }()
	if err := l.healDiff(); err != nil {
		return 0, err
	}
	lowers, native, err := d.pair(l, parent)
	if err != nil {
		return 0, err
	}
	if err := d.checkUses(l, state); err != nil {
		return 0, err
	}
	mounted, err := d.beginApply(l, state, false)
	if err != nil {
		return 0, err
	}
	opts := archive.UnpackOptions{Format: d.format, IDMap: d.opts.IDMap, Lowers: lowers}
	stats, err := d.limitedUnpack(l, func(ctx context.Context, progress func(archive.Stats)) (stats archive.Stats, err error) {
		if native && !mounted {
			opts.Progress = progress
			stats, err = archive.Unpack(ctx, l.path(diffName), diff, opts)
		} else {
			stats, err = d.applyMerged(l, state, diff)
		}
		if err == nil {
			err = d.recordApplied(ctx, l, lowers) // digests count against the limits, too
		}
		return stats, err
	})
	if err != nil {
		return 0, err
	}
	d.tellSkipped(l.id, stats)
	return stats.Size, d.endApply(l)
}

// tellSkipped logs what of a diff the layer lacks, which no error tells.
func (d *Driver) tellSkipped(id string, stats archive.Stats) {
	if n := stats.SkippedDevices; n > 0 {
		d.log.WithFields(logrus.Fields{"layer": id, "devices": n}).Warn("overlay2: devices left out: a user namespace may not make them")
	}
}

// beginApply marks the layer incomplete, and empties it if an earlier apply to it, when it
// was new, did not end well. Until the layer is closed no other process makes a child of it.
// A parent may have children, which are filled with it. If the layer is mounted, by this Driver or by a
// process that is no more, it must be filled through the mount: the kernel does not see what changes beneath one.
func (d *Driver) beginApply(l *layer, state *layerState, parent bool) (mounted bool, err error) {
	if err := l.lockHere(); err != nil {
		return false, err
	}
	if mounted, err = d.checkFillable(l, state); err != nil {
		return false, err
	}
	unread, err := l.refuseReaders()
	if err != nil {
		return false, err
	}
	defer unread.drop() // then it is incomplete, which readers look at
	s, err := d.openStaging()
	if err != nil {
		return false, err
	}
	defer s.close()
	links, err := s.ownLinks(l)
	if err != nil {
		return false, err
	}
	if lost, err := s.leadsNowhere(l, links); err != nil {
		return false, err
	} else if !lost && !parent { // otherwise its children cannot be in use, and wait for it
		if err := d.checkChildless(s, l, links); err != nil {
			return false, err
		}
	}
	if err := l.dropDigests(); err != nil {
		return false, err
	}
	mark, err := l.incomplete()
	switch {
	case err != nil:
		return false, err
	case mark == "":
		return mounted, d.markApplying(l)
	case mounted && state.mounts == 0:
		// Nobody can use it any more.
		if err := retryBusy(func() error { return d.unmountMerged(l) }); err != nil {
			return false, err
		}
		mounted = false
	}
	if mark == incompleteEmpty && !mounted {
		return false, d.emptyDiff(l, s)
	}
	return mounted, nil
}

// emptyDiff gives the layer a new diff. The seal of a layer that never had a child, which names the old one, is renewed with it.
func (d *Driver) emptyDiff(l *layer, s *staging) error {
	sealed, err := d.listsAll(l, -1)
	if err == nil {
		err = d.renewDiff(l, s)
	}
	if err == nil && sealed {
		err = d.setSeal(l, -1, unparented)
	}
	return err
}

// checkFillable returns ErrLayerInUse if another process uses the layer, or if it is mounted read-only, and
// reports whether it is mounted.
func (d *Driver) checkFillable(l *layer, state *layerState) (mounted bool, err error) {
	if state.mounts == 0 {
		if err := l.checkUnused(); err != nil {
			return false, err
		}
		if mounted, err = l.mounted(); err != nil || !mounted {
			return false, err
		}
	}
	committed, err := l.has(committedName)
	if err == nil && committed {
		err = fmt.Errorf("%w: mounted read-only", ErrLayerInUse)
	}
	return true, err
}

// markApplying marks a whole layer incomplete while a diff is applied to it.
func (d *Driver) markApplying(l *layer) error {
	if err := l.markIncomplete(); err != nil || d.opts.Durability != DurabilityBackground {
		return err
	}
	link, err := l.link()
	if err != nil {
		return err
	}
	return d.recordBegin(l, link)
}

// endApply makes a layer that was filled whole again.
func (d *Driver) endApply(l *layer) error {
	s, err := d.openStaging()
	if err != nil {
		return err
	}
	defer s.close()
	link, err := l.link()
	if err != nil {
		return err
	}
	turned, _ := s.leadsNowhere(l, []string{link}) // a link that is lost is not for an apply to mend
	switch {
	case d.opts.Durability == DurabilityBackground:
		return d.recordApply(l, s, link, turned)
	case turned: // two steps, which only a record ties together
		err := d.recordApply(l, s, link, turned)
		if err == nil && d.opts.Durability == DurabilityStrict {
			err = d.flush(false)
		}
		return err
	case d.opts.Durability == DurabilityStrict:
		if err := d.syncfs(l.fd); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
		if err := l.unmarkIncomplete(); err != nil {
			return err
		}
		if err := d.synced(sys.Fsync(l.fd)); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
		return nil
	}
	return l.unmarkIncomplete()
}

// markIncomplete makes the marker. It is a symlink, which is whole or not there, when power is cut too.
func (l *layer) markIncomplete() error {
	content := incompleteEmpty
	fd, err := sys.OpenDirat(l.fd, diffName)
	if err == nil {
		err = sys.ReadNames(fd, func(string) bool { content = incompleteContent; return false })
		err = errors.Join(err, sys.Close(fd))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", diffName, err)
	}
	if err := sys.Symlinkat(content, l.fd, incompleteName); err != nil {
		return fmt.Errorf("%s: %w", incompleteName, err)
	}
	return nil
}

// renewDiff replaces diff by an empty directory with the same metadata as a new layer's.
func (d *Driver) renewDiff(l *layer, s *staging) error {
	n := newLayer{d: d, s: s, id: l.id}
	links, err := l.lowers()
	if err != nil {
		return err
	}
	if len(links) > 0 {
		ids, err := resolve(d.home, links[:1])
		if err != nil {
			return err
		}
		if n.parent, err = openLayer(d.home, ids[0]); err != nil {
			return fmt.Errorf("parent %s: %w", ids[0], err)
		}
		defer n.parent.close()
	}
	return n.replaceDiff(l)
}

// replaceDiff swaps the layer's diff for a new one: at any moment there is one.
func (n *newLayer) replaceDiff(l *layer) (err error) {
	n.name = newPrefix + rand.Text()
	if err := sys.Mkdirat(n.s.fd, n.name, 0o700); err != nil {
		return fmt.Errorf("%s: %w", stagingDir, err)
	}
	defer func() {
		trashName, err2 := n.d.discard(n.s, n.s.fd, n.name, trashDiffPrefix)
		if err2 == nil {
			n.d.trash.add(n.d, trashName)
			if n.d.hasQuota() {
				n.d.trash.wait() // the old content counts against the layer's limits
			}
		}
		err = errors.Join(err, err2)
	}()
	fd, err := sys.OpenDirat(n.s.fd, n.name)
	if err != nil {
		return fmt.Errorf("%s: %w", stagingDir, err)
	}
	defer func() { err = errors.Join(err, sys.Close(fd)) }()
	if err := n.makeDiff(fd); err != nil {
		return fmt.Errorf("%s: %w", diffName, err)
	}
	err = sys.RenameExchange(fd, diffName, l.fd, diffName)
	if err == unix.EXDEV || err == unix.EINVAL {
		// A layer with a project of its own takes nothing from elsewhere; or a filesystem that
		// cannot swap. After a crash between these two healDiff makes the directory.
		err = unix.Renameat(l.fd, diffName, fd, "old")
		if err == nil && n.d.hasQuota() {
			err = sys.RemoveAllAt(fd, "old") // it counts against the layer's limits, which may be used up
		}
		if err == nil {
			err = n.makeDiff(l.fd)
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", diffName, err)
	}
	return nil
}

// healDiff makes the diff of a layer that was to be emptied when the process ended.
func (l *layer) healDiff() error {
	if mark, err := l.incomplete(); err != nil || mark != incompleteEmpty {
		return err
	}
	if has, err := l.has(diffName); err != nil || has {
		return err
	}
	return sys.Mkdirat(l.fd, diffName, 0o755) // for replaceDiff, which gives it its metadata
}

// applyMerged unpacks through a mount of the layer, whose lock is held.
func (d *Driver) applyMerged(l *layer, state *layerState, diff io.Reader) (stats archive.Stats, err error) {
	path, adopted, err := d.mountLayer(l, state, MountOpts{})
	if err != nil {
		return stats, err
	}
	if adopted && state.mounts == 0 {
		if state.use, err = l.joinUse(); err != nil {
			return stats, err
		}
		state.mounts++
		state.plain = false
	} else if state.mounts == 0 {
		defer func() { err = errors.Join(err, d.unmountMerged(l)) }()
	}
	opts := archive.UnpackOptions{Format: archive.Merged, IDMap: d.opts.IDMap}
	unpacked, err := archive.Unpack(context.Background(), path, diff, opts)
	if err != nil {
		return stats, err
	}
	stats, err = archive.Usage(context.Background(), l.path(diffName))
	stats.SkippedDevices = unpacked.SkippedDevices
	return stats, err
}
