//go:build linux

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/bcc2decd/overlay2"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"
)

// emptyLayer is the layer below that of each snapshot without a parent.
const emptyLayer = "empty"

// Options say how a Snapshotter works. The zero value is a good default.
type Options struct {
	// Durability says what is safe when power is cut. With overlay2.DurabilityBackground, the default, committed snapshots
	// are; with DurabilityStrict active ones are too, as far as their files were synced; with DurabilityOff none.
	Durability overlay2.Durability
	// MountOptions are passed to every overlay mount, such as "metacopy=on". "volatile" is refused: containerd
	// mounts a snapshot more than once.
	MountOptions []string
	// RemapIDs lets mounts of snapshots with id maps (labels containerd.io/snapshot/uidmapping and gidmapping)
	// ask containerd 2 for idmapped mounts. It must be told by the capability remap-ids; without, it maps owners itself.
	RemapIDs bool
	// Log takes what cannot be returned. Nil is slog.Default.
	Log *slog.Logger
}

// Snapshotter keeps snapshots as layers of a Driver. It is a snapshots.Snapshotter and a snapshots.Cleaner.
type Snapshotter struct {
	// Immutable after New.
	home     string // of the driver
	opts     Options
	log      *slog.Logger
	driver   *overlay2.Driver
	store    *storage.MetaStore
	storeLog *logrus.Entry

	closing sync.Mutex
	lock    *os.File // the root's; nil when closed. Protected by closing.
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// Prepare makes an active snapshot, which is to be written, and returns how to mount it. Labels limit it; see labels.go.
//
// Errors beside those of the store: InvalidArgument for labels that cannot be, FailedPrecondition for
// limits that the filesystem cannot hold and for a chain that is too long to be mounted.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View makes a read-only snapshot of parent and returns how to mount it.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (mounts []mount.Mount, err error) {
	var asked snapshots.Info
	for _, opt := range opts {
		if err := opt(&asked); err != nil {
			return nil, err
		}
	}
	want, err := parseLabels(asked.Labels)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", key, err)
	}
	err = s.tx(ctx, true, func(ctx context.Context) error {
		made, err := storage.CreateSnapshot(ctx, kind, key, parent, opts...)
		if err != nil {
			return err
		}
		snap := snapshot{Snapshot: made, key: key, want: want}
		if err := s.createLayer(snap); err != nil {
			return err
		}
		if mounts, err = s.mounts(snap); err != nil {
			return errors.Join(err, s.dropLayer(snap))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return mounts, nil
}

// snapshot is what the mounts of an active snapshot or a view depend on.
type snapshot struct {
	storage.Snapshot
	key  string
	want wanted
}

// hasLayer reports whether a snapshot has a layer of its own.
func hasLayer(kind snapshots.Kind, hasParent bool) bool {
	return kind != snapshots.KindView || !hasParent
}

// createLayer makes the layer of a snapshot that is about to be recorded, which needs one or not.
func (s *Snapshotter) createLayer(snap snapshot) (err error) {
	if !hasLayer(snap.Kind, len(snap.ParentIDs) > 0) {
		return nil
	}
	parent := emptyLayer
	if len(snap.ParentIDs) > 0 {
		parent = snap.ParentIDs[0]
	}
	var opts *overlay2.CreateOpts
	if snap.Kind == snapshots.KindActive && len(snap.want.limits) > 0 {
		opts = &overlay2.CreateOpts{StorageOpt: snap.want.limits}
	}
	err = s.driver.CreateReadWrite(snap.ID, parent, opts)
	if errors.Is(err, overlay2.ErrLayerExists) {
		// The number is new, so no snapshot has this layer: a Prepare that did not end well has left it.
		if err = s.driver.Remove(snap.ID); err == nil {
			err = s.driver.CreateReadWrite(snap.ID, parent, opts)
		}
	}
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", snap.key, s.toErrdefs(err))
	}
	if uid, gid, ok := snap.owner(s.opts.RemapIDs); ok {
		if err := os.Lchown(s.diffPath(snap.ID), uid, gid); err != nil {
			return errors.Join(fmt.Errorf("snapshot %s: %w", snap.key, err), s.dropLayer(snap))
		}
	}
	return nil
}

// dropLayer removes a layer whose snapshot will not be recorded. The write transaction is still open, so that nobody else
// has got its number.
func (s *Snapshotter) dropLayer(snap snapshot) error {
	if !hasLayer(snap.Kind, len(snap.ParentIDs) > 0) {
		return nil
	}
	return s.driver.Remove(snap.ID)
}

// diffPath returns where the files of a layer lie.
func (s *Snapshotter) diffPath(id string) string { return filepath.Join(s.home, id, "diff") }

// Mounts returns how to mount an active snapshot or a view.
func (s *Snapshotter) Mounts(ctx context.Context, key string) (mounts []mount.Mount, err error) {
	var snap snapshot
	err = s.tx(ctx, false, func(ctx context.Context) (err error) {
		snap, err = recorded(ctx, key)
		return err
	})
	if err == nil {
		mounts, err = s.mounts(snap)
	}
	if errdefs.IsDataLoss(err) {
		// It may have been removed since it was read, or be committed right now, its layer over another parent already. In a
		// write transaction nobody does: what then does not fit what is recorded is lost.
		err = s.tx(ctx, true, func(ctx context.Context) error {
			if snap, err = recorded(ctx, key); err == nil {
				mounts, err = s.mounts(snap)
			}
			return err
		})
	}
	return mounts, err
}

// recorded reads what the mounts of a snapshot depend on.
func recorded(ctx context.Context, key string) (snap snapshot, err error) {
	snap.key = key
	var info snapshots.Info
	snap.Snapshot, err = storage.GetSnapshot(ctx, key)
	if err == nil {
		_, info, _, err = storage.GetInfo(ctx, key)
	}
	if err == nil {
		snap.want, err = parseLabels(info.Labels)
	}
	if err != nil {
		return snap, fmt.Errorf("mounts of snapshot %s: %w", key, err)
	}
	return snap, nil
}

// Stat returns what is recorded of a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.tx(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes the labels of a snapshot. A new size or number of files of an active snapshot holds from then on, and
// none if the label is gone; an id map cannot change.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.tx(ctx, true, func(ctx context.Context) error {
		id, old, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		if updated, err = storage.UpdateInfo(ctx, info, fieldpaths...); err != nil || old.Kind == snapshots.KindCommitted {
			return err
		}
		return s.relabel(id, old, updated)
	})
	if err != nil {
		return snapshots.Info{}, err
	}
	return updated, nil
}

// Usage returns what the files of a snapshot take on disk, its parents not included. For an active one they are counted now, by
// the kernel if it has limits; for a committed one they were when it was committed. A view takes nothing.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var info snapshots.Info
	var id string
	err = s.tx(ctx, false, func(ctx context.Context) error {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	})
	if err == nil && info.Kind == snapshots.KindActive {
		usage, err = s.layerUsage(ctx, key, id, info.Labels)
	}
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage of snapshot %s: %w", key, err)
	}
	return usage, nil
}

// sameLayer returns an error unless a snapshot is still the one whose layer was read in a transaction before. One that was
// made anew under its key is another.
func sameLayer(ctx context.Context, key, id string) error {
	now, _, _, err := storage.GetInfo(ctx, key)
	if err == nil && now != id {
		err = fmt.Errorf("it was removed meanwhile and another made: %w", errdefs.ErrNotFound)
	}
	return err
}

// Commit makes a committed snapshot of an active one. If that was made without a parent it may get one now, by
// snapshots.WithParent.
//
// FailedPrecondition is, beside what the store says, a snapshot whose files have the owners of a user namespace: as a
// layer of an image they would be wrong.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var asked snapshots.Info
	for _, opt := range opts {
		if err := opt(&asked); err != nil {
			return err
		}
	}
	var id string
	var info snapshots.Info
	err := s.tx(ctx, false, func(ctx context.Context) (err error) {
		id, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err == nil {
		err = s.checkCommit(info)
	}
	if err != nil {
		return fmt.Errorf("commit snapshot %s: %w", key, err)
	}
	usage, err := s.layerUsage(ctx, key, id, info.Labels)
	if err == nil && s.opts.Durability != overlay2.DurabilityOff {
		err = s.driver.Sync()
	}
	if err != nil {
		return fmt.Errorf("commit snapshot %s: %w", key, err)
	}
	rebased := false
	err = s.tx(ctx, true, func(ctx context.Context) error {
		if err := sameLayer(ctx, key, id); err != nil {
			return err
		}
		if _, err := storage.CommitActive(ctx, key, name, usage, opts...); err != nil || info.Parent == asked.Parent || asked.Parent == "" {
			return err
		}
		parent, _, _, err := storage.GetInfo(ctx, asked.Parent)
		if err != nil {
			return err
		}
		rebased = true
		return s.toErrdefs(s.driver.Rebase(id, parent))
	})
	if err == nil {
		return nil
	}
	if rebased {
		err = errors.Join(err, s.putBack(context.WithoutCancel(ctx), id)) // New does so too, if this is never reached
	}
	return fmt.Errorf("commit snapshot %s: %w", key, err)
}

func (s *Snapshotter) checkCommit(info snapshots.Info) error {
	if info.Kind != snapshots.KindActive {
		return fmt.Errorf("it is not active: %w", errdefs.ErrFailedPrecondition)
	}
	want, err := parseLabels(info.Labels)
	if err != nil {
		return err
	}
	if s.opts.RemapIDs && want.mapped() && info.Parent != "" {
		return fmt.Errorf("its files have the owners of a user namespace (label %s): %w", snapshots.LabelSnapshotUIDMapping, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Remove removes a snapshot that is no parent. Its key can be used again at once; its files are deleted in the background.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.tx(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", key, err)
	}
	if err := s.driver.Remove(id); err != nil {
		// The snapshot is gone whatever becomes of its layer.
		s.log.Warn("layer of a removed snapshot stays until cleanup", "key", key, "layer", id, "error", err)
	}
	return nil
}

// Walk calls fn for each snapshot that a filter matches. No lock is held meanwhile: fn may call the Snapshotter.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	var infos []snapshots.Info
	err := s.tx(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
			infos = append(infos, info)
			return nil
		}, filters...)
	})
	if errdefs.IsNotFound(err) {
		return nil // nothing has been recorded ever
	}
	if err != nil {
		return err
	}
	for _, info := range infos {
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the use of the root. More than one call is harmless.
func (s *Snapshotter) Close() error {
	s.closing.Lock()
	defer s.closing.Unlock()
	if s.lock == nil {
		return nil
	}
	var err error
	if s.store != nil {
		err = s.store.Close()
	}
	if s.driver != nil {
		err = errors.Join(err, s.driver.Cleanup())
	}
	err = errors.Join(err, s.lock.Close())
	s.lock = nil
	return err
}

// lost says that a layer which is recorded is not there.
func (s *Snapshotter) lost(id string) error {
	return fmt.Errorf("layer %s is lost: %w", id, errdefs.ErrDataLoss)
}

// toErrdefs adds to an error of the driver what containerd knows it by.
func (s *Snapshotter) toErrdefs(err error) error {
	for _, e := range []struct{ ours, theirs error }{
		{overlay2.ErrLayerNotFound, errdefs.ErrDataLoss}, // it is recorded
		{overlay2.ErrCorrupt, errdefs.ErrDataLoss},
		{overlay2.ErrIncomplete, errdefs.ErrDataLoss},
		{overlay2.ErrLayerExists, errdefs.ErrAlreadyExists},
		{overlay2.ErrInvalidOption, errdefs.ErrInvalidArgument},
		{overlay2.ErrInvalidID, errdefs.ErrInvalidArgument}, // a layer that is to be over itself: IDs are the store's
		{overlay2.ErrLayerInUse, errdefs.ErrFailedPrecondition},
		{overlay2.ErrTooDeep, errdefs.ErrFailedPrecondition},
		{overlay2.ErrNotSupported, errdefs.ErrFailedPrecondition},
	} {
		if errors.Is(err, e.ours) {
			return fmt.Errorf("%w: %w", err, e.theirs)
		}
	}
	return err
}
