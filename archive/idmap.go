package archive

import (
	"fmt"
	"math"
)

// IDRange maps Size ids from ContainerID on to as many from HostID on.
type IDRange struct {
	ContainerID uint32
	HostID      uint32
	Size        uint32
}

// IDMap translates owners between a container (the ids in a tar) and the host (the
// ids on disk). The zero value changes nothing.
type IDMap struct {
	UIDs []IDRange
	GIDs []IDRange
}

// Empty reports whether the map changes nothing because it holds no range.
func (m IDMap) Empty() bool { return len(m.UIDs) == 0 && len(m.GIDs) == 0 }

// ToHost translates an owner in a tar to one on disk. An id without a counterpart is ErrUnmapped.
func (m IDMap) ToHost(uid, gid uint32) (hostUID, hostGID uint32, err error) {
	if hostUID, err = toHost(m.UIDs, "uid", uid); err != nil {
		return 0, 0, err
	}
	if hostGID, err = toHost(m.GIDs, "gid", gid); err != nil {
		return 0, 0, err
	}
	return hostUID, hostGID, nil
}

// ToContainer translates an owner on disk to one in a tar. An id without a counterpart is ErrUnmapped.
func (m IDMap) ToContainer(uid, gid uint32) (containerUID, containerGID uint32, err error) {
	if containerUID, err = toContainer(m.UIDs, "uid", uid); err != nil {
		return 0, 0, err
	}
	if containerGID, err = toContainer(m.GIDs, "gid", gid); err != nil {
		return 0, 0, err
	}
	return containerUID, containerGID, nil
}

// Root returns the host's owner for the container's root, 0:0 for an empty map.
func (m IDMap) Root() (uid, gid uint32, err error) { return m.ToHost(0, 0) }

// Validate reports a range that is empty, runs over 2^32-2 (2^32-1 means "no id" to
// the kernel), or overlaps another on either side.
func (m IDMap) Validate() error {
	for _, s := range []struct {
		what   string
		ranges []IDRange
	}{{"uid", m.UIDs}, {"gid", m.GIDs}} {
		for i, r := range s.ranges {
			if r.Size == 0 {
				return fmt.Errorf("%s map: range %d is empty", s.what, i)
			}
			if end := uint64(max(r.ContainerID, r.HostID)) + uint64(r.Size); end > math.MaxUint32 {
				return fmt.Errorf("%s map: range %d ends beyond id 4294967294", s.what, i)
			}
			for j, o := range s.ranges[:i] {
				if overlap(r.ContainerID, o.ContainerID, r.Size, o.Size) || overlap(r.HostID, o.HostID, r.Size, o.Size) {
					return fmt.Errorf("%s map: ranges %d and %d overlap", s.what, j, i)
				}
			}
		}
	}
	return nil
}

// overlap reports whether [a, a+aSize) and [b, b+bSize) share an id. Neither wraps around.
func overlap(a, b, aSize, bSize uint32) bool {
	return uint64(a) < uint64(b)+uint64(bSize) && uint64(b) < uint64(a)+uint64(aSize)
}

func toHost(ranges []IDRange, what string, id uint32) (uint32, error) {
	if len(ranges) == 0 {
		return id, nil
	}
	for _, r := range ranges {
		if id >= r.ContainerID && id-r.ContainerID < r.Size {
			return r.HostID + (id - r.ContainerID), nil
		}
	}
	return 0, fmt.Errorf("%w: %s %d", ErrUnmapped, what, id)
}

func toContainer(ranges []IDRange, what string, id uint32) (uint32, error) {
	if len(ranges) == 0 {
		return id, nil
	}
	for _, r := range ranges {
		if id >= r.HostID && id-r.HostID < r.Size {
			return r.ContainerID + (id - r.HostID), nil
		}
	}
	return 0, fmt.Errorf("%w: %s %d", ErrUnmapped, what, id)
}
