//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// Mount is a read-only view of a layer, held by a descriptor and in no mount table: no path
// can leak it, and it is gone when it is closed or when the process dies. The layer cannot be
// removed, nor a diff be applied to it, while it is open, by other processes neither.
type Mount struct {
	id    string
	close func() // gives the layer back

	mu     sync.Mutex
	fd     int // -1 when closed. Protected by mu.
	target string
}

// Mount returns a new view of the layer's tree, its ancestors included. Any layer can be
// viewed, many times at once, but one with a parent that is mounted for writing: ErrLayerInUse. What is written
// to a layer while a view of it is open the view may show or not.
//
// It needs Linux 5.2, for a layer without a parent 5.12; before them it is ErrNotSupported. On
// kernels without the new mount API for layers (6.7) the view is made in a mount namespace of its own.
func (d *Driver) Mount(id string, opts MountOpts) (*Mount, error) {
	m, err := d.view(id, opts)
	if err != nil {
		return nil, layerErr("mount", id, err)
	}
	return m, nil
}

func (d *Driver) view(id string, opts MountOpts) (_ *Mount, err error) {
	if err := errors.Join(checkMountLabel(opts.Label), d.checkMap(opts.IDMap)); err != nil {
		return nil, err
	}
	if err := checkID(id); err != nil {
		return nil, err
	}
	_, unlock := d.layers.lock(id)
	defer unlock()
	l, err := openLayer(d.home, id)
	if err != nil {
		return nil, err
	}
	defer l.close()
	defer func() { err = l.gone(err) }()
	reader, err := l.joinReaders()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			reader.drop()
		}
	}()
	if err := errors.Join(l.checkWhole(), d.checkSynced(l)); err != nil {
		return nil, err
	}
	fd, err := d.viewLayer(l, opts)
	if errors.Is(err, unix.ENOSYS) {
		err = unsupported("the kernel has no detached mounts: %w", err)
	}
	if err != nil {
		return nil, err
	}
	return &Mount{id: id, fd: fd, close: reader.drop}, nil
}

// viewLayer returns a descriptor of a detached, read-only mount of the layer.
func (d *Driver) viewLayer(l *layer, opts MountOpts) (fd int, err error) {
	links, err := l.lowers()
	if err != nil {
		return -1, err
	}
	if len(links) == 0 {
		// The one directory that it is, also while somebody writes to it.
		dirfd, err := sys.OpenBeneath(l.fd, diffName)
		if err != nil {
			return -1, corrupt("%s: %w", diffName, err)
		}
		if opts.IDMap.Empty() {
			fd, err = sys.CloneReadOnly(dirfd)
		} else {
			fd, err = d.cloneMapped(dirfd, opts.IDMap, true)
		}
		return fd, errors.Join(err, sys.Close(dirfd))
	}
	committed, err := l.has(committedName)
	if err != nil {
		return -1, err
	}
	if !committed {
		if mounted, err := l.mounted(); err != nil {
			return -1, err
		} else if mounted {
			return -1, fmt.Errorf("%w: mounted for writing", ErrLayerInUse)
		}
	}
	spec, err := d.mountSpec(l, links, true)
	if err != nil {
		return -1, err
	}
	defer spec.chain.close()
	spec.label = opts.Label
	if len(spec.lowers) > maxLowers {
		return -1, fmt.Errorf("%w: a view of %d layers, at most %d", ErrTooDeep, len(spec.lowers), maxLowers)
	}
	if !opts.IDMap.Empty() {
		return d.viewMapped(spec, opts.IDMap)
	}
	if d.opts.MountMethod == MountFiles {
		return spec.detachedFiles(unix.MOUNT_ATTR_RDONLY)
	}
	if d.facts.newAPI == yes && d.opts.MountMethod != MountLegacy && d.opts.MountMethod != MountDescriptors {
		return spec.detached(unix.MOUNT_ATTR_RDONLY)
	}
	if err := spec.checkAll(); err != nil {
		return -1, err
	}
	target := d.home + "/" + stagingDir
	return sys.DetachedAt(target, func() error { return spec.mountHere(target, d.opts.MountMethod) })
}

// FD returns the descriptor of the mount's root, an O_PATH one, for the calls that take a
// directory's descriptor. It belongs to the Mount; it is -1 when that is closed.
func (m *Mount) FD() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fd
}

// Path returns a path of the root that works in this process while the Mount is open.
func (m *Mount) Path() string { return sys.ProcPath(m.FD()) }

// File opens the mount's root for reading. The caller closes it; until then the mount stays,
// but no longer keeps the layer from being removed once the Mount is closed.
func (m *Mount) File() (*os.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fd < 0 {
		return nil, layerErr("open", m.id, os.ErrClosed)
	}
	fd, err := sys.OpenDirat(m.fd, ".")
	if err != nil {
		return nil, layerErr("open", m.id, err)
	}
	return os.NewFile(uintptr(fd), m.id), nil
}

// Attach puts the mount at path, an existing directory, for all to see. From then on it is the
// caller's to unmount, best before Close, and lives on after it. It can be attached once.
// While the Mount is open an unmount without MNT_DETACH is EBUSY.
func (m *Mount) Attach(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fd < 0 {
		return layerErr("attach", m.id, os.ErrClosed)
	}
	if m.target != "" {
		return layerErr("attach", m.id, fmt.Errorf("%w: attached at %s", ErrLayerInUse, m.target))
	}
	if err := sys.MoveMount(m.fd, path); err != nil {
		return layerErr("attach", m.id, err)
	}
	m.target = path
	return nil
}

// Close gives the view up. More than one call is harmless.
func (m *Mount) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fd < 0 {
		return nil
	}
	err := sys.Close(m.fd)
	m.fd = -1
	m.close()
	return layerErr("close", m.id, err)
}

// MountData returns how Get mounts the layer, without mounting it and without counting a use:
// while somebody else has the layer mounted the caller must keep it from being removed.
func (d *Driver) MountData(id, mountLabel string) (MountData, error) {
	data, err := d.mountData(id, mountLabel)
	return data, layerErr("mount data", id, err)
}

func (d *Driver) mountData(id, mountLabel string) (MountData, error) {
	if err := checkMountLabel(mountLabel); err != nil {
		return MountData{}, err
	}
	if err := checkID(id); err != nil {
		return MountData{}, err
	}
	_, unlock := d.layers.lock(id)
	defer unlock()
	l, err := openLayer(d.home, id)
	if err != nil {
		return MountData{}, err
	}
	defer l.close()
	if err := errors.Join(l.checkWhole(), l.checkDiff()); err != nil {
		return MountData{}, err
	}
	links, err := l.lowers()
	if err != nil {
		return MountData{}, err
	}
	committed, err := l.has(committedName)
	if err != nil {
		return MountData{}, err
	}
	if len(links) == 0 {
		m := MountData{Type: "bind", Source: l.path(diffName), Options: []string{"rbind", "rw"}, ReadOnly: committed}
		if committed {
			m.Options[1] = "ro"
		}
		return m, nil
	}
	spec, err := d.mountSpec(l, links, committed)
	if err != nil {
		return MountData{}, err
	}
	defer spec.chain.close()
	if err := spec.checkAll(); err != nil {
		return MountData{}, err
	}
	spec.label = mountLabel
	spec.dirs()
	return spec.public(), nil
}

// public returns the spec, whose names are directories, as data.
func (s mountSpec) public() MountData {
	m := MountData{Type: "overlay", Source: "overlay", ReadOnly: s.upper == ""}
	add := func(key, value string) { m.Fsconfig = append(m.Fsconfig, [2]string{key, value}) }
	lowers := make([]string, len(s.lowers))
	for i, lower := range s.lowers {
		path := s.home + "/" + lower
		lowers[i] = escapeMountName(path)
		add("lowerdir+", path)
	}
	m.Options = append(m.Options, "lowerdir="+strings.Join(lowers, ":"))
	if s.upper != "" {
		upper, work := s.home+"/"+s.upper, s.home+"/"+s.work
		m.Options = append(m.Options, "upperdir="+escapeMountName(upper), "workdir="+escapeMountName(work))
		// Unlike lowerdir+, these are unescaped by the kernel.
		add("upperdir", strings.ReplaceAll(upper, `\`, `\\`))
		add("workdir", strings.ReplaceAll(work, `\`, `\\`))
	}
	for _, o := range s.options {
		m.Options = append(m.Options, o)
		key, value, _ := strings.Cut(o, "=")
		add(key, value)
	}
	if s.label != "" {
		m.Options = append(m.Options, `context="`+s.label+`"`)
		add("context", s.label)
	}
	return m
}
