package overlay2

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/bcc2decd/overlay2/quota"
	"golang.org/x/sys/unix"
)

// Usage returns what the layer takes on disk. For one with limits this costs the same
// however large it is; else its directory is walked. The figures differ from DiffSize: they are blocks and
// inodes, with all directories and what overlayfs and the driver keep beside diff.
func (d *Driver) Usage(id string) (Usage, error) {
	u, err := d.usage(id)
	return u, layerErr("usage", id, err)
}

func (d *Driver) usage(id string) (Usage, error) {
	l, err := openLayer(d.home, id)
	if err != nil {
		return Usage{}, err
	}
	defer l.close()
	if d.quota != nil {
		may, has, err := d.quota.Get(l.dir())
		if err == nil {
			return Usage{Bytes: has.Bytes, Inodes: has.Inodes, MaxBytes: may.Bytes, MaxInodes: may.Inodes}, nil
		}
		if !errors.Is(err, quota.ErrNoProject) {
			return Usage{}, err
		}
	}
	var st unix.Stat_t
	if err := sys.Fstat(l.fd, &st); err != nil {
		return Usage{}, err
	}
	w := usageWalk{dev: uint64(st.Dev), links: make(map[uint64]bool)}
	w.add(&st)
	if err := w.tree(l.fd); err != nil {
		return Usage{}, err
	}
	return w.usage, nil
}

// usageWalk adds up blocks and inodes of a tree on one filesystem, which may change meanwhile.
type usageWalk struct {
	usage  Usage
	dev    uint64
	links  map[uint64]bool // inodes with several names that were counted
	frames []usageFrame    // the directories from the top to the one at work
	dents  sys.DirReader
}

// maxUsageOpen is how many nested directories a walk keeps open. Those far up are closed, and opened again by "..":
// a container can nest deeper than there are descriptors.
const maxUsageOpen = 64

type usageFrame struct {
	fd   int // -1 while closed
	name string
	ino  uint64
	dirs []string // directories in it that are still to be walked
}

// tree adds what lies in an open directory.
func (w *usageWalk) tree(fd int) (err error) {
	defer func() {
		for _, f := range w.frames {
			if f.fd >= 0 {
				_ = sys.Close(f.fd) // opened for reading: nothing can be lost
			}
		}
	}()
	if err := w.enter(fd, "."); err != nil {
		return err
	}
	for len(w.frames) > 0 {
		f := &w.frames[len(w.frames)-1]
		n := len(f.dirs)
		if n == 0 {
			if err := w.leave(); err != nil {
				return err
			}
			continue
		}
		name := f.dirs[n-1]
		f.dirs = f.dirs[:n-1]
		if err := w.enter(f.fd, name); err != nil {
			return err
		}
	}
	return nil
}

// enter adds the entries of a directory and makes it the one at work. That it is gone, or something else by now, is no error.
func (w *usageWalk) enter(dirfd int, name string) error {
	fd, err := sys.OpenDirat(dirfd, name)
	if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP {
		return nil
	}
	if err != nil {
		return w.at(name, err)
	}
	w.frames = append(w.frames, usageFrame{fd: fd, name: name})
	f := &w.frames[len(w.frames)-1]
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return w.at("", err)
	}
	f.ino = st.Ino
	if err := w.list(f); err != nil {
		return err
	}
	if old := len(w.frames) - 1 - maxUsageOpen; old >= 0 {
		fd := w.frames[old].fd
		w.frames[old].fd = -1
		return sys.Close(fd)
	}
	return nil
}

// list adds the entries of the directory at work. That it, or one of them, is deleted meanwhile is no error.
func (w *usageWalk) list(f *usageFrame) error {
	w.dents.Start(f.fd)
	for {
		entry, _, err := w.dents.Next()
		switch {
		case err == unix.ENOENT: // what the kernel says of a directory that was removed
			return nil
		case err != nil:
			return w.at("", err)
		case entry == nil:
			return nil
		}
		name := string(entry)
		var st unix.Stat_t
		switch err := sys.Fstatat(f.fd, name, &st); {
		case err == unix.ENOENT || err == nil && uint64(st.Dev) != w.dev: // gone, or the layer's own mount
			continue
		case err != nil:
			return w.at(name, err)
		}
		w.add(&st)
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			f.dirs = append(f.dirs, name)
		}
	}
}

// leave goes back to the directory above.
func (w *usageWalk) leave() error {
	f := w.frames[len(w.frames)-1]
	if len(w.frames) > 1 {
		up := &w.frames[len(w.frames)-2]
		if up.fd < 0 {
			fd, err := sys.OpenParent(f.fd, w.dev, up.ino)
			if err != nil {
				return w.at("..", err)
			}
			up.fd = fd
		}
	}
	w.frames = w.frames[:len(w.frames)-1]
	return sys.Close(f.fd)
}

// at says at which path in the layer an error came.
func (w *usageWalk) at(name string, err error) error {
	path := make([]string, 0, len(w.frames)+1)
	for _, f := range w.frames {
		path = append(path, f.name)
	}
	return fmt.Errorf("%s: %w", filepath.Join(append(path, name)...), err)
}

func (w *usageWalk) add(st *unix.Stat_t) {
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if w.links[st.Ino] {
			return
		}
		w.links[st.Ino] = true
	}
	w.usage.Inodes++
	w.usage.Bytes += uint64(st.Blocks) * 512
}
