//go:build linux

package overlay2

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// An overlay with mapped owners is made of layers each of which is an idmapped mount, its
// upper one too: so whatever is on disk has the owners of the image, and a layer that a container with a map has
// written is like any other. The overlay's own work in upper is done by the user who mounts it, who
// must be one that the map knows: the container's root.

// mappedBy is a way of giving idmapped mounts to an overlay.
type mappedBy uint8

const (
	mappedNot mappedBy = iota
	// mappedFD: as open files, in no mount table (FSCONFIG_SET_FD).
	mappedFD
	// mappedAttached: by name, in a mount namespace that is thrown away.
	mappedAttached
)

// mapping is how mounts with mapped owners are made here, found out when it is first asked for:
// that starts a process.
func (d *Driver) mapping() (mappedBy, error) {
	d.mappedOnce.Do(func() { d.mapped, d.mappedErr = d.probeMapped(mappedFD, mappedAttached) })
	return d.mapped, d.mappedErr
}

// probeCover is what mappedNames covers when it mounts the probe: none of its layers.
const probeCover = "cover"

// probeMapped returns the first of the ways that works with layers of its own.
func (d *Driver) probeMapped(ways ...mappedBy) (by mappedBy, err error) {
	name := "probe-" + rand.Text()
	staging := filepath.Join(d.home, stagingDir)
	tmp := filepath.Join(staging, name)
	for _, dir := range []string{"l1/diff", "l2/diff", "up/diff/sub", "up/work", probeCover} {
		if err := os.MkdirAll(filepath.Join(tmp, dir), 0o755); err != nil {
			return mappedNot, errors.Join(err, removeProbe(staging, name))
		}
	}
	defer func() { err = errors.Join(err, removeProbe(staging, name)) }()
	one := []archive.IDRange{{ContainerID: 0, HostID: 1, Size: 1}}
	ns, err := newMap(archive.IDMap{UIDs: one, GIDs: one})
	if err != nil {
		return mappedNot, unsupported("no mounts with mapped owners: %w", err)
	}
	defer func() { err = errors.Join(err, ns.close()) }()
	spec := mountSpec{home: tmp, lowers: []string{"l1/diff", "l2/diff"}, upper: "up/diff", work: "up/work", options: d.facts.mountOptions()}
	var failed error
	for _, by := range ways {
		err := spec.tryMapped(ns, by)
		if err == nil {
			return by, nil
		}
		failed = errors.Join(failed, err)
	}
	return mappedNot, unsupported("no mounts with mapped owners on %s: %w", d.facts.backingFS, failed)
}

// tryMapped mounts the spec with root as user 1 and has a file change its owner's mind.
func (s mountSpec) tryMapped(ns *idMapped, by mappedBy) error {
	fd, err := s.detachedMapped(ns, by, 0)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = sys.Fstatat(fd, "sub", &st)
	if err == nil && (st.Uid != 1 || st.Gid != 1) {
		err = fmt.Errorf("owners are not mapped: %d:%d", st.Uid, st.Gid)
	}
	if err == nil {
		err = unix.Fchmodat(fd, "sub", 0o700, 0)
	}
	return errors.Join(err, sys.Close(fd))
}

// idMapped is a map as the kernel takes it.
type idMapped struct {
	ns       int // user namespace
	uid, gid int // the container's root
}

func newMap(m archive.IDMap) (*idMapped, error) {
	uid, gid, err := m.Root()
	if err != nil {
		return nil, err
	}
	ns, err := sys.NewUserNS(procMap(m.UIDs), procMap(m.GIDs))
	if err != nil {
		return nil, err
	}
	return &idMapped{ns: ns, uid: int(uid), gid: int(gid)}, nil
}

func (m *idMapped) close() error { return sys.Close(m.ns) }

func procMap(ranges []archive.IDRange) []syscall.SysProcIDMap {
	m := make([]syscall.SysProcIDMap, len(ranges))
	for i, r := range ranges {
		m[i] = syscall.SysProcIDMap{ContainerID: int(r.ContainerID), HostID: int(r.HostID), Size: int(r.Size)}
	}
	return m
}

// checkMap refuses a map that no mount of this Driver can have.
func (d *Driver) checkMap(m archive.IDMap) error {
	if m.Empty() {
		return nil
	}
	switch err := m.Validate(); {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrInvalidOption, err)
	case len(m.UIDs) == 0 || len(m.GIDs) == 0:
		return fmt.Errorf("%w: a mount's id map needs uids and gids", ErrInvalidOption)
	case !d.opts.IDMap.Empty():
		return fmt.Errorf("%w: the layers of this Driver are mapped on disk", ErrInvalidOption)
	}
	if _, _, err := m.Root(); err != nil {
		return fmt.Errorf("%w: id map without root: %w", ErrInvalidOption, err)
	}
	return nil
}

// withMap calls f with the map as the kernel takes it.
func (d *Driver) withMap(m archive.IDMap, f func(*idMapped, mappedBy) error) (err error) {
	by, err := d.mapping()
	if err != nil {
		return err
	}
	ns, err := newMap(m)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ns.close()) }()
	return f(ns, by)
}

// detachedMapped returns a descriptor of the overlay of idmapped layers, in no mount table.
func (s mountSpec) detachedMapped(ns *idMapped, by mappedBy, attrs int) (fd int, err error) {
	if err := s.checkAll(); err != nil {
		return -1, err
	}
	s.dirs()
	if by == mappedFD {
		err = sys.OnOwnThread(func() error {
			if err := sys.AsOwner(ns.uid, ns.gid); err != nil {
				return err
			}
			fd, err = s.mappedFiles(ns, attrs)
			return err
		})
		return fd, err
	}
	staging := s.home + "/" + stagingDir
	if s.chain == nil {
		staging = s.home + "/" + probeCover
	}
	return sys.DetachedAt(staging+"/m", func() error { return s.mappedNames(ns, staging, attrs) })
}

// mappedFiles makes the overlay of open files.
func (s mountSpec) mappedFiles(ns *idMapped, attrs int) (fd int, err error) {
	homefd, err := sys.OpenRoot(s.home)
	if err != nil {
		return -1, err
	}
	// The clones stay open until the overlay has its own: closed, a mount cannot be cloned.
	fds := []int{homefd}
	defer func() {
		for _, fd := range fds {
			err = errors.Join(err, sys.Close(fd))
		}
	}()
	open := func(path string, readOnly bool) (int, error) {
		clone, err := cloneMapped(homefd, path, ns, readOnly)
		if err == nil {
			fds = append(fds, clone)
		}
		return clone, err
	}
	return s.ofFiles(open, attrs)
}

// mappedNames makes the overlay of mounts in the mount namespace that the thread has for
// itself, at staging/m: staging is covered by a filesystem that vanishes with the namespace.
func (s mountSpec) mappedNames(ns *idMapped, staging string, attrs int) error {
	homefd, err := sys.OpenRoot(s.home)
	if err != nil {
		return err
	}
	defer func() { _ = sys.Close(homefd) }() // opened for reading
	if err := unix.Mount("overlay2", staging, "tmpfs", 0, "mode=711"); err != nil {
		return &sys.MountError{Call: "mount", Target: staging, Err: err}
	}
	attach := func(at, dir string, readOnly bool) error {
		clone, err := cloneMapped(homefd, dir, ns, readOnly)
		if err != nil {
			return err
		}
		path := staging + "/" + at
		if err = os.Mkdir(path, 0o700); err == nil {
			err = sys.MoveMount(clone, path)
		}
		return errors.Join(err, sys.Close(clone))
	}
	named := mountSpec{home: staging, options: s.options, label: s.label}
	for i, lower := range s.lowers {
		if err := attach(strconv.Itoa(i), lower, true); err != nil {
			return err
		}
		named.lowers = append(named.lowers, strconv.Itoa(i))
	}
	if s.upper != "" {
		if err := attach("u", filepath.Dir(s.upper), false); err != nil {
			return err
		}
		named.upper, named.work = "u/"+diffName, "u/"+workName
	}
	if err := errors.Join(os.Mkdir(staging+"/m", 0o700), sys.AsOwner(ns.uid, ns.gid)); err != nil {
		return err
	}
	var flags uintptr
	if attrs&unix.MOUNT_ATTR_RDONLY != 0 {
		flags = unix.MS_RDONLY
	}
	return sys.MountOverlayHere(staging, staging+"/m", named.data(""), flags)
}

// cloneMapped returns a descriptor of an idmapped mount of the directory at a path beneath homefd.
func cloneMapped(homefd int, path string, ns *idMapped, readOnly bool) (int, error) {
	fd, err := sys.OpenBeneath(homefd, path)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	clone, err := sys.CloneMapped(fd, ns.ns, readOnly)
	return clone, errors.Join(err, sys.Close(fd))
}

// GetWith is Get with more options: the layer's tree with its owners mapped for a container's
// user namespace. Each call needs a Put. All who have got a layer at the same time must want the same map:
// with another than it is mounted with (Get has none) it is ErrLayerInUse. For a mount of
// another process, or of one that is no more, that is told by the owner of the layer's root.
//
// To map owners takes a user namespace, for which the library has the kernel start a process that
// is killed before it runs anything (see docs/kernel.md), the first time to find out what the kernel can do.
func (d *Driver) GetWith(id string, opts MountOpts) (string, error) {
	path, err := d.getWith(id, opts)
	return path, layerErr("get", id, err)
}

// checkOwners refuses another map than that with which the layer is mounted.
func (s *layerState) checkOwners(m archive.IDMap) error {
	if slices.Equal(s.owners.UIDs, m.UIDs) && slices.Equal(s.owners.GIDs, m.GIDs) {
		return nil
	}
	return fmt.Errorf("%w: mounted with another id map", ErrLayerInUse)
}

// checkMerged returns ErrLayerInUse if what is mounted at merged is not mounted with this map.
func (l *layer) checkMerged(m archive.IDMap) error {
	var disk, shown unix.Stat_t
	if err := errors.Join(sys.Fstatat(l.fd, diffName, &disk), sys.Fstatat(l.fd, mergedName, &shown)); err != nil {
		return err
	}
	uid, gid, err := m.ToHost(disk.Uid, disk.Gid)
	if err == nil && uid == shown.Uid && gid == shown.Gid {
		return nil
	}
	if errors.Is(err, archive.ErrUnmapped) && (shown.Uid != disk.Uid || shown.Gid != disk.Gid) {
		return nil // shown as nobody
	}
	return fmt.Errorf("%w: mounted with another id map", ErrLayerInUse)
}

// checkPlain is checkMerged for a layer that is used without a mount.
func (l *layer) checkPlain() error {
	if has, err := l.has(mergedName); err != nil || !has {
		return err
	}
	if mounted, err := l.mounted(); err != nil || !mounted {
		return err
	}
	return l.checkMerged(archive.IDMap{})
}

// mountMapped mounts the overlay with mapped owners at the layer's merged.
func (d *Driver) mountMapped(l *layer, spec mountSpec, m archive.IDMap) error {
	if len(spec.lowers) > maxLowers {
		return fmt.Errorf("%w: a mount of %d layers, at most %d", ErrTooDeep, len(spec.lowers), maxLowers)
	}
	return d.withMap(m, func(ns *idMapped, by mappedBy) error {
		fd, err := spec.detachedMapped(ns, by, 0)
		if err != nil {
			return err
		}
		return errors.Join(sys.MoveMount(fd, l.path(mergedName)), sys.Close(fd))
	})
}

// viewMapped is the overlay with mapped owners, in no mount table.
func (d *Driver) viewMapped(spec mountSpec, m archive.IDMap) (fd int, err error) {
	err = d.withMap(m, func(ns *idMapped, by mappedBy) error {
		fd, err = spec.detachedMapped(ns, by, unix.MOUNT_ATTR_RDONLY)
		return err
	})
	return fd, err
}

// bindMapped mounts a layer without a parent at its merged, with mapped owners.
func (d *Driver) bindMapped(l *layer, m archive.IDMap, readOnly bool) error {
	dirfd, err := sys.OpenBeneath(l.fd, diffName)
	if err != nil {
		return corrupt("%s: %w", diffName, err)
	}
	fd, err := d.cloneMapped(dirfd, m, readOnly)
	if err = errors.Join(err, sys.Close(dirfd)); err != nil {
		return err
	}
	return errors.Join(sys.MoveMount(fd, l.path(mergedName)), sys.Close(fd))
}

// cloneMapped returns a descriptor of a mount of the open directory with mapped owners.
func (d *Driver) cloneMapped(dirfd int, m archive.IDMap, readOnly bool) (fd int, err error) {
	err = d.withMap(m, func(ns *idMapped, _ mappedBy) error {
		fd, err = sys.CloneMapped(dirfd, ns.ns, readOnly)
		return err
	})
	return fd, err
}

// mappingStatus is what Status says of mapped mounts.
func (d *Driver) mappingStatus() string {
	switch by, err := d.mapping(); {
	case err != nil:
		return "false: " + err.Error()
	case by == mappedAttached:
		return "true: attached"
	}
	return "true: by descriptor"
}
