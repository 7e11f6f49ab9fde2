//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"github.com/spf13/cobra"
)

func (a *app) rmCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm ID|IMAGE...",
		Aliases: []string{"remove"},
		Short:   "remove layers, and images with the layers that nothing else needs",
		Args:    cobra.MinimumNArgs(1),
		RunE:    func(_ *cobra.Command, args []string) error { return a.rm(args, force) },
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "unmount a mounted layer first")
	return cmd
}

func (a *app) rm(refs []string, force bool) error {
	removed := []string{}
	err := a.existingLocked(func(d *overlay2.Driver) error {
		for _, ref := range refs {
			gone, err := a.remove(d, ref, force)
			removed = append(removed, gone...)
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("rm: %w", err)
	}
	return a.result(struct {
		Removed []string `json:"removed"`
	}{removed}, func(w io.Writer) error {
		for _, r := range removed {
			if _, err := fmt.Fprintln(w, short(r)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (a *app) remove(d *overlay2.Driver, ref string, force bool) ([]string, error) {
	img, l, err := a.imageOrLayer(ref)
	if errors.Is(err, store.ErrRecord) {
		return a.removeDamaged(d, ref, force, err)
	}
	if err != nil {
		return nil, err
	}
	if img != nil {
		return a.removeImage(d, img, force)
	}
	used, err := a.users(l.ID)
	if err != nil {
		return nil, err
	}
	if len(used) > 0 {
		return nil, fmt.Errorf("layer %s %w by %s", short(l.ID), store.ErrInUse, used[0])
	}
	if err := a.checkFree(d, []string{l.ID}, force); err != nil {
		return nil, err
	}
	return []string{l.ID}, a.removeLayers(d, []string{l.ID})
}

// all returns everything that may need a layer: images, those with a damaged record too, and layers.
func (a *app) all() ([]*store.Image, []*store.Layer, error) {
	images, damaged, err := a.store.Images()
	if err != nil {
		return nil, nil, err
	}
	for _, i := range damaged {
		if i.Layers == nil {
			return nil, nil, fmt.Errorf("which layers image %s needs is not known (rm %s removes it): %w", i.Name, i.Name, i.Err)
		}
		images = append(images, &store.Image{Name: i.Name, Layers: i.Layers})
	}
	layers, err := a.store.Layers()
	return images, layers, err
}

// removeDamaged removes an image whose record is damaged; its layers, if that does not tell them, stay.
func (a *app) removeDamaged(d *overlay2.Driver, name string, force bool, why error) ([]string, error) {
	_, damaged, err := a.store.Images()
	if err != nil {
		return nil, err
	}
	for _, i := range damaged {
		if i.Name != name && i.Name != name+":latest" {
			continue
		}
		if i.Layers == nil {
			return []string{i.Name}, a.store.DeleteImage(i.Name)
		}
		return a.removeImage(d, &store.Image{Name: i.Name, Layers: i.Layers}, force)
	}
	return nil, why // it is a layer's record
}

// users returns what needs the layer: images and layers above it, in words.
func (a *app) users(id string) ([]string, error) {
	images, layers, err := a.all()
	if err != nil {
		return nil, err
	}
	var used []string
	for _, i := range images {
		if slices.Contains(i.Layers, id) {
			used = append(used, "image "+i.Name)
		}
	}
	for _, l := range layers {
		if l.Parent == id {
			used = append(used, "layer "+short(l.ID))
		}
	}
	return used, nil
}

// removeImage removes a name, and the layers that nothing needs any more; nothing, if one of those is in use.
func (a *app) removeImage(d *overlay2.Driver, img *store.Image, force bool) ([]string, error) {
	images, layers, err := a.all()
	if err != nil {
		return nil, err
	}
	for _, l := range layers {
		if l.Kind != store.KindContainer || !slices.Contains(img.Layers, l.Parent) {
			continue
		}
		// A layer that another image keeps may go on having children.
		if !slices.ContainsFunc(images, func(i *store.Image) bool { return i.Name != img.Name && slices.Contains(i.Layers, l.Parent) }) {
			return nil, fmt.Errorf("image %s %w by layer %s", img.Name, store.ErrInUse, l.ID)
		}
	}
	gone, err := a.unneeded(img)
	if err != nil {
		return nil, err
	}
	if err := a.checkFree(d, gone, force); err != nil {
		return nil, err
	}
	if err := a.store.DeleteImage(img.Name); err != nil {
		return nil, err
	}
	removed := slices.Clone(gone)
	slices.Reverse(removed)
	err = a.removeLayers(d, gone)
	if err != nil && img.ID != "" && len(gone) > 0 && d.Exists(removed[0]) {
		// Somebody was quicker than the look at the layers: all are there still.
		return nil, errors.Join(err, a.store.PutImage(img))
	}
	return append([]string{img.Name}, removed...), err
}

// unneeded returns those of an image's layers, the lowest first, that nothing needs once the image has lost its name: from the top
// down to one that something else does need. Layers in keep are needed.
func (a *app) unneeded(img *store.Image, keep ...string) ([]string, error) {
	images, layers, err := a.all()
	if err != nil {
		return nil, err
	}
	needed := map[string]int{} // by how many
	for _, id := range keep {
		needed[id]++
	}
	for _, i := range images {
		for _, id := range i.Layers {
			if i.Name != img.Name {
				needed[id]++
			}
		}
	}
	for _, l := range layers {
		needed[l.Parent]++
	}
	ids, from := img.Layers, len(img.Layers)
	for from > 0 && needed[ids[from-1]] == 0 {
		if from--; from > 0 {
			needed[ids[from-1]]-- // the layer that goes was a child of this one
		}
	}
	return slices.Clone(ids[from:]), nil
}
