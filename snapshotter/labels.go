//go:build linux

package snapshotter

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

const (
	// LabelMaxInodes limits the number of files of an active snapshot, as snapshots.LabelSnapshotMaxSize limits
	// its bytes. Both need project quotas, without which they are refused.
	LabelMaxInodes = "containerd.io/snapshot/overlay2.max-inodes"
	// labelParentChainID names the parent that a layer is going to get when it is committed. containerd sets it when it unpacks
	// an image (core/unpack, labelSnapshotParent).
	labelParentChainID = "containerd.io/snapshot/parent-chain-id"
)

// wanted is what the labels of a snapshot ask for. Labels that are not known are kept and mean nothing.
type wanted struct {
	uids, gids string // as containerd writes them; both or none
	ids        archive.IDMap
	limits     map[string]string // storage options of a Driver
	rebase     bool              // it is going to get a parent
}

// mapped reports whether owners are mapped.
func (w wanted) mapped() bool { return w.uids != "" }

// parseLabels reads labels. What cannot be is InvalidArgument, and names the label.
func parseLabels(labels map[string]string) (w wanted, err error) {
	w.uids, w.gids = labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]
	if (w.uids == "") != (w.gids == "") {
		return w, fmt.Errorf("label %s and %s: both or none: %w", snapshots.LabelSnapshotUIDMapping, snapshots.LabelSnapshotGIDMapping, errdefs.ErrInvalidArgument)
	}
	if w.ids.UIDs, err = parseRanges(w.uids); err != nil {
		return w, badLabel(labels, snapshots.LabelSnapshotUIDMapping, err)
	}
	if w.ids.GIDs, err = parseRanges(w.gids); err != nil {
		return w, badLabel(labels, snapshots.LabelSnapshotGIDMapping, err)
	}
	if w.mapped() {
		err := w.ids.Validate()
		if err == nil {
			_, _, err = w.ids.Root()
		}
		if err != nil {
			return w, badLabel(labels, snapshots.LabelSnapshotUIDMapping, err)
		}
	}
	for _, l := range []struct{ label, option string }{{snapshots.LabelSnapshotMaxSize, "size"}, {LabelMaxInodes, "inodes"}} {
		value := labels[l.label]
		if value == "" {
			continue
		}
		if n, err := strconv.ParseInt(value, 10, 64); err != nil || n <= 0 {
			return w, badLabel(labels, l.label, fmt.Errorf("not a number above 0"))
		}
		if w.limits == nil {
			w.limits = map[string]string{}
		}
		w.limits[l.option] = value
	}
	w.rebase = labels[labelParentChainID] != ""
	return w, nil
}

func badLabel(labels map[string]string, name string, err error) error {
	return fmt.Errorf("label %s=%q: %w: %w", name, labels[name], err, errdefs.ErrInvalidArgument)
}

// parseRanges reads "container:host:size,...".
func parseRanges(s string) (ranges []archive.IDRange, err error) {
	if s == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		fields := strings.Split(part, ":")
		if len(fields) != 3 {
			return nil, fmt.Errorf("%q is not container:host:size", part)
		}
		var n [3]uint32
		for i, f := range fields {
			v, err := strconv.ParseUint(f, 10, 32)
			if err != nil || v == math.MaxUint32 {
				return nil, fmt.Errorf("%q: %q is not an id", part, f)
			}
			n[i] = uint32(v)
		}
		ranges = append(ranges, archive.IDRange{ContainerID: n[0], HostID: n[1], Size: n[2]})
	}
	return ranges, nil
}

// owner returns who the root directory of a new layer belongs to if owners are mapped. The upper directory of an overlay is
// not: what is written there has the host's ids. A bind mount is mapped as a whole.
func (s snapshot) owner(remap bool) (uid, gid int, ok bool) {
	if !s.want.mapped() || s.Kind != snapshots.KindActive || remap && s.isBind() {
		return 0, 0, false
	}
	u, g, err := s.want.ids.Root()
	return int(u), int(g), err == nil
}

// isBind reports whether an active snapshot is mounted as the one directory that it is.
func (s snapshot) isBind() bool { return len(s.ParentIDs) == 0 && !s.want.rebase }

// relabel does what new labels ask for, or refuses them.
func (s *Snapshotter) relabel(id string, old, updated snapshots.Info) error {
	before, err := parseLabels(old.Labels)
	if err != nil {
		before = wanted{}
	}
	after, err := parseLabels(updated.Labels)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", old.Name, err)
	}
	if before.uids != after.uids || before.gids != after.gids {
		return fmt.Errorf("snapshot %s: the id map of a snapshot cannot change: %w", old.Name, errdefs.ErrFailedPrecondition)
	}
	if before.rebase != after.rebase && old.Parent == "" {
		return fmt.Errorf("snapshot %s: label %s cannot change: %w", old.Name, labelParentChainID, errdefs.ErrFailedPrecondition)
	}
	if old.Kind != snapshots.KindActive {
		return nil
	}
	changed := map[string]string{}
	for _, option := range []string{"size", "inodes"} {
		switch was, now := before.limits[option], after.limits[option]; {
		case was == now:
		case now == "":
			changed[option] = "none"
		default:
			changed[option] = now
		}
	}
	if len(changed) == 0 {
		return nil
	}
	if err := s.driver.Resize(id, changed); err != nil {
		return fmt.Errorf("snapshot %s: %w", old.Name, s.toErrdefs(err))
	}
	return nil
}
