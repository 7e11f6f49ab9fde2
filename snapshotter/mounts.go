//go:build linux

package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/bcc2decd/overlay2"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// mounts returns how containerd is to mount a snapshot. The forms are those of its own overlay snapshotter, which it and
// others look into: a bind mount of a single layer, or one overlay with upperdir=, workdir= and lowerdir=.
func (s *Snapshotter) mounts(snap snapshot) ([]mount.Mount, error) {
	chain := slices.Clone(snap.ParentIDs)
	if hasLayer(snap.Kind, len(chain) > 0) {
		chain = append([]string{snap.ID}, chain...)
	}
	data, err := s.driver.MountData(chain[0], "")
	if errors.Is(err, overlay2.ErrLayerNotFound) {
		err = s.lost(chain[0])
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", snap.key, s.toErrdefs(err))
	}
	o, err := s.parseOverlay(data, chain)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", snap.key, err)
	}
	m := o.mount(snap, s.opts.RemapIDs)
	if n := dataLen(m); m.Type == "overlay" && n > os.Getpagesize()-1 {
		return nil, fmt.Errorf("snapshot %s: %d layers take %d bytes, a mount of containerd %d at most: %w", snap.key, len(chain), n, os.Getpagesize()-1, errdefs.ErrFailedPrecondition)
	}
	return []mount.Mount{m}, nil
}

// overlay is a mount of a chain, parsed.
type overlay struct {
	upper   string   // of the chain's first layer
	work    string   // empty if the layer is committed
	lowers  []string // of the others, the empty layer excluded
	empty   string
	options []string
}

// parseOverlay takes the driver's mount of a chain apart, and makes sure that it is the chain which is recorded.
func (s *Snapshotter) parseOverlay(data overlay2.MountData, chain []string) (o overlay, err error) {
	var lowers []string
	for _, option := range data.Options {
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "lowerdir":
			lowers = strings.Split(value, ":") // no colon is in a path: see checkRoot
		case "upperdir":
			o.upper = value
		case "workdir":
			o.work = value
		default:
			o.options = append(o.options, option)
		}
	}
	if o.upper != "" {
		lowers = append([]string{o.upper}, lowers...)
	}
	var want []string
	for _, id := range append(slices.Clone(chain), emptyLayer) {
		want = append(want, s.diffPath(id))
	}
	if data.Type != "overlay" || !slices.Equal(lowers, want) {
		return o, fmt.Errorf("layers on the disk are %q, recorded are %q: %w", lowers, want, errdefs.ErrDataLoss)
	}
	last := len(lowers) - 1
	o.upper, o.lowers, o.empty = lowers[0], lowers[1:last], lowers[last]
	return o, nil
}

// mount returns the mount of a snapshot.
func (o overlay) mount(snap snapshot, remap bool) mount.Mount {
	var options []string
	if remap && snap.want.mapped() {
		options = append(options, "uidmap="+snap.want.uids, "gidmap="+snap.want.gids)
	}
	bind := func(flag string) mount.Mount {
		return mount.Mount{Type: "bind", Source: o.upper, Options: append(options, flag, "rbind")}
	}
	lowers := o.lowers
	if snap.Kind == snapshots.KindActive {
		if snap.isBind() {
			return bind("rw")
		}
		options = append(options, "workdir="+o.work, "upperdir="+o.upper)
	} else {
		// containerd does not map owners of a read-only bind mount: then it is an overlay of two.
		if len(lowers) == 0 && len(options) == 0 {
			return bind("ro")
		}
		lowers = append([]string{o.upper}, lowers...)
	}
	if len(lowers) == 0 || snap.Kind == snapshots.KindView && len(lowers) == 1 {
		lowers = append(slices.Clone(lowers), o.empty)
	}
	options = append(options, "lowerdir="+strings.Join(lowers, ":"))
	return mount.Mount{Type: "overlay", Source: "overlay", Options: append(options, o.options...)}
}

// dataLen returns the length of the data that containerd gives mount(2): where it would be near a page, layers are named
// relative to the directory that they lie in.
func dataLen(m mount.Mount) int {
	full, short := -1, -1
	for _, o := range m.Options {
		if strings.HasPrefix(o, "uidmap=") || strings.HasPrefix(o, "gidmap=") {
			continue // for containerd
		}
		full += len(o) + 1
		short += len(o) + 1
		if value, ok := strings.CutPrefix(o, "lowerdir="); ok {
			lowers := strings.Split(value, ":")
			dir := strings.LastIndexByte(strings.TrimSuffix(lowers[0], "/diff"), '/') + 1
			short -= dir * len(lowers)
		}
	}
	if full < os.Getpagesize()-512 {
		return full
	}
	return short
}
