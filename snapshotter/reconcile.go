//go:build linux

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/bcc2decd/overlay2"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// layers returns the numbers of the layers on the disk, lowest first. "empty" has none.
func (s *Snapshotter) layers() (numbers []uint64, err error) {
	entries, err := os.ReadDir(s.home)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if n, err := strconv.ParseUint(e.Name(), 10, 64); err == nil && strconv.FormatUint(n, 10) == e.Name() {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// Cleanup deletes what no snapshot is recorded for, and returns when that, and all that was removed before, is deleted.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	err := s.tx(ctx, true, s.removeOrphans)
	if err != nil {
		return fmt.Errorf("cleanup: %w", err)
	}
	return s.driver.Cleanup()
}

// reconcile makes records and layers fit each other.
func (s *Snapshotter) reconcile(ctx context.Context, highest uint64) error {
	return s.tx(ctx, true, func(ctx context.Context) error {
		if highest > 0 {
			records, err := s.records(ctx)
			if err != nil {
				return fmt.Errorf("%w: %w", ErrCorrupt, err)
			}
			if err := s.dropLost(ctx, records); err != nil {
				return err
			}
			s.mendChains(records)
		}
		return s.removeOrphans(ctx)
	})
}

// record is a snapshot as it is recorded.
type record struct {
	snapshots.Info
	id       string
	parent   *record
	children int
}

// records reads the store.
func (s *Snapshotter) records(ctx context.Context) (map[string]*record, error) {
	records := map[string]*record{}
	ids := map[string]string{}
	err := storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
		id, _, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		if info.Kind < snapshots.KindView || info.Kind > snapshots.KindCommitted || id == "0" {
			return fmt.Errorf("snapshot %s has kind %d and number %s", info.Name, info.Kind, id)
		}
		if other, twice := ids[id]; twice {
			return fmt.Errorf("snapshots %s and %s have the same number %s", info.Name, other, id)
		}
		ids[id] = info.Name
		records[info.Name] = &record{Info: info, id: id}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		if r.Parent == "" {
			continue
		}
		r.parent = records[r.Parent]
		if r.parent == nil || r.parent.Kind != snapshots.KindCommitted {
			return nil, fmt.Errorf("snapshot %s has the parent %s, which is not there or not committed", r.Name, r.Parent)
		}
		r.parent.children++
	}
	return records, nil
}

// dropLost removes the records of snapshots that have lost their layer, as a power cut may take that of an active one. A
// snapshot that has children stays recorded: their layers may hold what somebody wants.
func (s *Snapshotter) dropLost(ctx context.Context, records map[string]*record) error {
	for again := true; again; {
		again = false
		for key, r := range records {
			if r.children > 0 || !hasLayer(r.Kind, r.parent != nil) {
				continue
			}
			// What cannot be read now, or is no directory, is not lost: it would be removed once nothing is recorded for it.
			if _, err := os.Lstat(filepath.Join(s.home, r.id)); !errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if _, _, err := storage.Remove(ctx, key); err != nil {
				return err
			}
			s.log.Warn("snapshot has lost its layer and is forgotten", "key", key, "kind", r.Kind, "layer", r.id)
			delete(records, key)
			if r.parent != nil {
				r.parent.children--
			}
			again = true
		}
	}
	return nil
}

// mendChains puts layers over the parent that is recorded where a killed Commit has left them over another.
func (s *Snapshotter) mendChains(records map[string]*record) {
	for key, r := range records {
		if !hasLayer(r.Kind, r.parent != nil) {
			continue
		}
		want := emptyLayer
		if r.parent != nil {
			want = r.parent.id
		}
		now, err := s.parentOf(r.id)
		if err == nil && now == want {
			continue
		}
		if err == nil && (now == emptyLayer || want == emptyLayer) {
			if err = s.driver.Rebase(r.id, want); err == nil {
				s.log.Info("layer is over its recorded parent again", "key", key, "layer", r.id, "parent", want)
				continue
			}
		}
		s.log.Error("snapshot cannot be used", "key", key, "layer", r.id, "parent", now, "recorded", want, "error", err)
	}
}

// putBack puts the layer of a Commit that failed over the parent that is recorded: another Commit may have come since, and
// recorded one.
func (s *Snapshotter) putBack(ctx context.Context, id string) error {
	return s.tx(ctx, true, func(ctx context.Context) error {
		keys, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		key, there := keys[id]
		if !there {
			return nil // it was removed since
		}
		_, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		parent := emptyLayer
		if info.Parent != "" {
			if parent, _, _, err = storage.GetInfo(ctx, info.Parent); err != nil {
				return err
			}
		}
		return s.driver.Rebase(id, parent)
	})
}

// parentOf returns the layer that another is over.
func (s *Snapshotter) parentOf(id string) (string, error) {
	m, err := s.driver.GetMetadata(id)
	if err != nil {
		return "", err
	}
	nearest, _, _ := strings.Cut(m["LowerDir"], ":")
	return filepath.Base(filepath.Dir(nearest)), nil
}

// removeOrphans removes the layers that no snapshot is recorded for. In the write transaction nobody makes one.
func (s *Snapshotter) removeOrphans(ctx context.Context) error {
	recorded, err := storage.IDMap(ctx)
	if err != nil && !errdefs.IsNotFound(err) { // nothing has been recorded ever
		return err
	}
	numbers, err := s.layers()
	if err != nil {
		return err
	}
	// Children first. One with a lower number than its parent takes another round.
	for left := -1; len(numbers) != left; {
		left = len(numbers)
		slices.Reverse(numbers)
		var kept []uint64
		for _, n := range numbers {
			id := strconv.FormatUint(n, 10)
			if _, ok := recorded[id]; ok {
				continue
			}
			switch err := s.driver.Remove(id); {
			case err == nil:
				s.log.Info("layer without a snapshot is removed", "layer", id)
			case errors.Is(err, overlay2.ErrLayerInUse):
				kept = append(kept, n)
			case errors.Is(err, overlay2.ErrCorrupt): // what is none of the driver's is no reason to keep the rest, or not to start
				s.log.Error("layer without a snapshot cannot be removed", "layer", id, "error", err)
			default:
				return err
			}
		}
		slices.Reverse(kept)
		numbers = kept
	}
	if len(numbers) > 0 {
		s.log.Warn("layers without a snapshot are in use", "layers", numbers)
	}
	return nil
}
