//go:build linux

package main

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func (a *app) createCommand() *cobra.Command {
	var from, size string
	cmd := &cobra.Command{
		Use:   "create [NAME]",
		Short: "create a read-write layer over an image or a layer",
		Long: `create makes a layer to write in, on top of an image or of another layer (which is
read-only from then on); without --from, on top of nothing. It prints the new layer's id:
NAME, or one that is made up.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			name := ""
			if len(args) == 1 {
				if name = args[0]; name == "" {
					return fmt.Errorf("%w: it is empty", store.ErrName)
				}
			}
			return a.create(name, from, size)
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "image or layer beneath")
	cmd.Flags().StringVar(&size, "size", "", "limit of the layer, such as 10G (needs project quotas)")
	return cmd
}

func (a *app) create(name, from, size string) error {
	if name == "" {
		var b [6]byte
		if _, err := rand.Read(b[:]); err != nil {
			return err
		}
		name = "c-" + hex.EncodeToString(b[:])
	}
	if err := store.CheckContainerName(name); err != nil {
		return err
	}
	l := &store.Layer{ID: name, Kind: store.KindContainer, Created: now(), Pending: true}
	err := a.locked(func(d *overlay2.Driver) error {
		if err := a.resolveParent(l, from); err != nil {
			return err
		}
		switch have, err := a.store.Layer(name); {
		case err == nil && !have.Pending:
			return fmt.Errorf("layer %q %w", name, store.ErrExists)
		case err == nil:
			if err := a.removeLayers(d, []string{name}); err != nil {
				return err
			}
		case !errors.Is(err, store.ErrNotFound):
			return err
		}
		if d.Exists(name) {
			return fmt.Errorf("layer %q %w, made by somebody else", name, store.ErrExists)
		}
		if err := a.store.StageLayer(l); err != nil {
			return err
		}
		var opts *overlay2.CreateOpts
		if size != "" {
			opts = &overlay2.CreateOpts{StorageOpt: map[string]string{"size": size}}
		}
		if err := d.CreateReadWrite(name, l.Parent, opts); err != nil {
			return errors.Join(err, a.store.DeleteLayers(name))
		}
		l.Pending = false
		return a.store.PutLayer(l)
	})
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	return a.result(l, line("%s", name))
}

// resolveParent sets what lies beneath the layer l: an image's top layer, or a layer.
func (a *app) resolveParent(l *store.Layer, from string) error {
	if from == "" {
		return nil
	}
	img, parent, err := a.imageOrLayer(from)
	if err != nil {
		return err
	}
	if img != nil {
		l.Image, l.Config = img.Name, img.Config
		if n := len(img.Layers); n > 0 {
			l.Parent = img.Layers[n-1]
		}
		return nil
	}
	if parent.Pending {
		return fmt.Errorf("layer %q %w: it was never finished", from, store.ErrNotFound)
	}
	l.Parent, l.Image, l.Config = parent.ID, parent.Image, parent.Config
	return nil
}

// imageOrLayer finds what ref names: an image of this very name, a layer of this very name, an image with the tag "latest" added, or a
// layer by the beginning of its id.
func (a *app) imageOrLayer(ref string) (*store.Image, *store.Layer, error) {
	img, err := a.store.Image(ref)
	if !errors.Is(err, store.ErrNotFound) {
		return img, nil, err
	}
	l, err := a.store.Layer(ref)
	if !errors.Is(err, store.ErrNotFound) {
		return nil, l, err
	}
	if img, err := a.image(ref); !errors.Is(err, store.ErrNotFound) {
		return img, nil, err
	}
	l, err = a.store.Find(ref)
	if errors.Is(err, store.ErrNotFound) {
		err = fmt.Errorf("image or layer %q %w", ref, store.ErrNotFound)
	}
	return nil, l, err
}

// image finds an image by its name, with or without the tag "latest".
func (a *app) image(name string) (*store.Image, error) {
	img, err := a.store.Image(name)
	if errors.Is(err, store.ErrNotFound) {
		if img, lerr := a.store.Image(name + ":latest"); !errors.Is(lerr, store.ErrNotFound) {
			return img, lerr
		}
	}
	return img, err
}

func (a *app) mountCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "mount ID [PATH]",
		Short: "mount a layer and print where; also at PATH",
		Long: `mount joins the layer with those beneath it and prints the directory. It stays mounted
until umount, whatever becomes of this process. With PATH, a directory, it is bound there too.
An image layer is mounted read-only.`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 1 {
				return a.mount(args[0], "")
			}
			return a.mount(args[0], args[1])
		},
	}
}

func (a *app) mount(ref, at string) error {
	var path string
	err := a.existingLocked(func(d *overlay2.Driver) error {
		l, err := a.findLayer(ref)
		if err != nil {
			return err
		}
		if at != "" {
			if at, err = filepath.Abs(at); err == nil {
				at, err = filepath.EvalSymlinks(at)
			}
			if err != nil {
				return err
			}
		}
		merged, was, err := a.mounted(d, l.ID)
		if err != nil {
			return err
		}
		if path = merged; !was {
			if path, err = d.Get(l.ID, ""); err != nil {
				return err
			}
		}
		if at == "" {
			return nil
		}
		if err := a.bind(l, path, at); err != nil {
			if !was {
				err = errors.Join(err, d.Put(l.ID))
			}
			return err
		}
		path = at
		return nil
	})
	if err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	return a.result(map[string]string{"id": ref, "path": path}, line("%s", path))
}

// bind mounts path at the place at too. The record goes first: a bind that nobody knows of
// would keep the layer busy.
func (a *app) bind(l *store.Layer, path, at string) error {
	points, err := mountPoints()
	if err != nil {
		return err
	}
	l.Binds = slices.DeleteFunc(l.Binds, func(b string) bool { return !points[b] }) // a reboot forgets mounts
	if slices.Contains(l.Binds, at) {
		return nil
	}
	l.Binds = append(l.Binds, at)
	if err := a.store.PutLayer(l); err != nil {
		return err
	}
	if err := unix.Mount(path, at, "", unix.MS_BIND, ""); err != nil {
		l.Binds = l.Binds[:len(l.Binds)-1]
		return errors.Join(&os.PathError{Op: "bind", Path: at, Err: err}, a.store.PutLayer(l))
	}
	return nil
}

// mounted returns where the driver mounts the layer, and whether it is mounted now.
func (a *app) mounted(d *overlay2.Driver, id string) (string, bool, error) {
	m, err := d.GetMetadata(id)
	if err != nil {
		return "", false, err
	}
	points, err := mountPoints()
	if err != nil {
		return "", false, err
	}
	return m["MergedDir"], points[m["MergedDir"]], nil
}

func (a *app) umountCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "umount ID",
		Aliases: []string{"unmount"},
		Short:   "unmount a layer",
		Args:    cobra.ExactArgs(1),
		RunE:    func(_ *cobra.Command, args []string) error { return a.umount(args[0]) },
	}
}

func (a *app) umount(ref string) error {
	err := a.existingLocked(func(d *overlay2.Driver) error {
		l, err := a.findLayer(ref)
		if err != nil {
			return err
		}
		done, err := a.unmountLayer(d, l)
		if err == nil && !done {
			err = fmt.Errorf("layer %s: %w", short(l.ID), overlay2.ErrNotMounted)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("umount: %w", err)
	}
	return a.result(map[string]string{"id": ref}, func(_ io.Writer) error { return nil })
}

// unmountLayer undoes all mounts of a layer, and reports whether there were any.
func (a *app) unmountLayer(d *overlay2.Driver, l *store.Layer) (bool, error) {
	points, err := mountPoints()
	if err != nil {
		return false, err
	}
	done := false
	for _, at := range slices.Backward(slices.Clone(l.Binds)) {
		if points[at] {
			if err := unix.Unmount(at, unix.UMOUNT_NOFOLLOW); err != nil {
				return done, &os.PathError{Op: "unmount", Path: at, Err: err}
			}
			done = true
		}
		l.Binds = slices.DeleteFunc(l.Binds, func(b string) bool { return b == at })
		if err := a.store.PutLayer(l); err != nil {
			return done, err
		}
	}
	_, was, err := a.mounted(d, l.ID)
	if err != nil || !was {
		return done, err
	}
	return true, d.Put(l.ID)
}

// findLayer returns the whole layer that ref names.
func (a *app) findLayer(ref string) (*store.Layer, error) {
	l, err := a.store.Find(ref)
	if err != nil {
		return nil, err
	}
	if l.Pending {
		return nil, fmt.Errorf("layer %q %w: it was never finished; remove it with rm", ref, store.ErrNotFound)
	}
	return l, nil
}

// existingLocked is locked for commands that need a store.
func (a *app) existingLocked(f func(*overlay2.Driver) error) error {
	if !a.store.Exists() {
		return a.existing(nil)
	}
	return a.locked(f)
}
