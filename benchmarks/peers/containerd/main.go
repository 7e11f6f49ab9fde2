//go:build linux

// Command containerd is containerd's overlay snapshotter with its apply and its walking
// diff behind the harness's protocol. The digest that containerd takes of every stream
// is left out, in its favour: the other systems leave that to their callers.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/bcc2decd/overlay2/benchmarks/wire"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"
)

func main() { wire.Main(&system{committed: map[string]bool{}}) }

type system struct {
	snapshotter snapshots.Snapshotter
	home        string

	mu        sync.Mutex
	committed map[string]bool // layers that have had a child
}

func (s *system) ctx() context.Context { return context.Background() }

func (s *system) Open(home string, _ bool) (err error) {
	s.home = home
	if err := os.MkdirAll(home+".tmp", 0o700); err != nil {
		return err
	}
	if err := mount.SetTempMountLocation(home + ".tmp"); err != nil {
		return err
	}
	s.snapshotter, err = overlay.NewSnapshotter(home)
	return err
}

func (s *system) Close() error { return nil }

// name is the name under which a layer can be a parent: a snapshot must be committed first.
func (s *system) name(id string) (string, error) {
	if id == "" {
		return "", nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	name := "committed-" + id
	if s.committed[id] {
		return name, nil
	}
	if err := s.snapshotter.Commit(s.ctx(), name, id); err != nil {
		return "", err
	}
	s.committed[id] = true
	return name, nil
}

func (s *system) Create(id, parent string) error {
	name, err := s.name(parent)
	if err != nil {
		return err
	}
	_, err = s.snapshotter.Prepare(s.ctx(), id, name)
	return err
}

// Apply does what the differ's apply does: straight into the upper directory, with the
// parents at hand.
func (s *system) Apply(id, _ string, tar io.Reader) (int64, error) {
	mounts, err := s.snapshotter.Mounts(s.ctx(), id)
	if err != nil {
		return 0, err
	}
	if mounts[0].Type == "overlay" {
		upper, lowers := paths(mounts[0])
		opts := []archive.ApplyOpt{archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)}
		if len(lowers) > 0 {
			opts = append(opts, archive.WithParents(lowers))
		}
		return archive.Apply(s.ctx(), upper, tar, opts...)
	}
	var size int64
	err = mount.WithTempMount(s.ctx(), mounts, func(root string) (err error) {
		size, err = archive.Apply(s.ctx(), root, tar)
		return err
	})
	return size, err
}

func paths(m mount.Mount) (upper string, lowers []string) {
	for _, o := range m.Options {
		if v, ok := strings.CutPrefix(o, "upperdir="); ok {
			upper = v
		} else if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
			lowers = strings.Split(v, ":")
		}
	}
	return upper, lowers
}

// compare mounts a layer and its parent and gives both to f, as the walking differ does.
func (s *system) compare(id, parent string, f func(lower, upper string) error) (err error) {
	ctx := s.ctx()
	upper, err := s.snapshotter.Mounts(ctx, id)
	if err != nil {
		return err
	}
	var lower []mount.Mount
	if parent != "" {
		name, err := s.name(parent)
		if err != nil {
			return err
		}
		key := "view-" + id
		if lower, err = s.snapshotter.View(ctx, key, name); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.snapshotter.Remove(ctx, key)) }()
	}
	return mount.WithTempMount(ctx, lower, func(lowerRoot string) error {
		return mount.WithReadonlyTempMount(ctx, upper, func(upperRoot string) error {
			return f(lowerRoot, upperRoot)
		})
	})
}

func (s *system) WriteDiff(id, parent string, w io.Writer) error {
	return s.compare(id, parent, func(lower, upper string) error {
		return archive.WriteDiff(s.ctx(), w, lower, upper)
	})
}

func (s *system) Diff(string, string) (io.ReadCloser, error) { return nil, errors.ErrUnsupported }

// DiffSize is the usage of an active snapshot, counted in blocks.
func (s *system) DiffSize(id, _ string) (int64, error) {
	u, err := s.snapshotter.Usage(s.ctx(), id)
	return u.Size, err
}

type change struct {
	kind fs.ChangeKind
	path string
}

type changes []change

func (c changes) Len() int { return len(c) }

func (c changes) Line(i int) string {
	letter := "C "
	switch c[i].kind {
	case fs.ChangeKindAdd:
		letter = "A "
	case fs.ChangeKindDelete:
		letter = "D "
	}
	return letter + c[i].path
}

func (s *system) Changes(id, parent string) (wire.Changes, error) {
	var list changes
	err := s.compare(id, parent, func(lower, upper string) error {
		return fs.Changes(s.ctx(), lower, upper, func(k fs.ChangeKind, path string, _ os.FileInfo, err error) error {
			if err == nil && k != fs.ChangeKindUnmodified {
				list = append(list, change{k, path})
			}
			return err
		})
	})
	return list, err
}

func (s *system) target(id string) string { return filepath.Join(s.home+".tmp", "mount-"+id) }

func (s *system) Get(id string) (string, error) {
	mounts, err := s.snapshotter.Mounts(s.ctx(), id)
	if err != nil {
		return "", err
	}
	target := s.target(id)
	if err := os.Mkdir(target, 0o700); err != nil {
		return "", err
	}
	return target, mount.All(mounts, target)
}

func (s *system) Put(id string) error {
	if err := mount.Unmount(s.target(id), unix.MNT_DETACH); err != nil {
		return err
	}
	return os.Remove(s.target(id))
}

func (s *system) Remove(id string) error { return s.snapshotter.Remove(s.ctx(), id) }

func (s *system) Upper(id string) (string, error) {
	mounts, err := s.snapshotter.Mounts(s.ctx(), id)
	if err != nil {
		return "", err
	}
	if mounts[0].Type == "bind" {
		return mounts[0].Source, nil
	}
	upper, _ := paths(mounts[0])
	return upper, nil
}
