//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"github.com/spf13/cobra"
)

func (a *app) verifyCommand() *cobra.Command {
	var record bool
	cmd := &cobra.Command{
		Use:   "verify [LAYER|IMAGE]...",
		Short: "compare layers with the digests that were recorded of their files; exit code 1 if any differs",
		Long: `verify reads layers, all if none is named, and lists each path that is not what was recorded when
the layer was imported with --record-digests, or by verify --record: bit rot, and changes by hand or, of a
container, by what ran in it. A layer without digests that was named is an error.`,
		RunE: func(_ *cobra.Command, args []string) error { return a.verify(args, record) },
	}
	cmd.Flags().BoolVar(&record, "record", false, "record digests of what is there now, instead")
	return cmd
}

// What verify says of a layer.
const (
	statusOK        = "ok"
	statusDifferent = "different"
	statusRecorded  = "recorded"
	statusUnknown   = "no digests"
)

type verified struct {
	ID          string       `json:"id"`
	Status      string       `json:"status"`
	Differences []difference `json:"differences,omitempty"`
}

type difference struct {
	Path string   `json:"path"`
	What []string `json:"what"`
}

func (a *app) verify(refs []string, record bool) error {
	layers, bad := []verified{}, 0
	err := a.existing(func(d *overlay2.Driver) error {
		ids, err := a.layersOf(refs)
		if err != nil {
			return err
		}
		for _, id := range ids {
			v, err := a.verifyLayer(d, id, record)
			if errors.Is(err, overlay2.ErrNoDigests) && len(refs) == 0 {
				v.Status, err = statusUnknown, nil
			}
			if err != nil {
				return err
			}
			if v.Status == statusDifferent {
				bad++
			}
			layers = append(layers, v)
		}
		return nil
	})
	if err == nil {
		err = a.result(struct {
			Layers []verified `json:"layers"`
		}{layers}, func(w io.Writer) error {
			for _, v := range layers {
				if err := line("%s: %s", v.ID, v.Status)(w); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	if bad > 0 {
		return fmt.Errorf("verify: %d layers with differences %w", bad, errFound)
	}
	return nil
}

// verifyLayer compares one layer, or records it. As text, differences are written when they are found.
func (a *app) verifyLayer(d *overlay2.Driver, id string, record bool) (v verified, err error) {
	v = verified{ID: id, Status: statusRecorded}
	if record {
		return v, d.RecordDigests(a.ctx, id)
	}
	v.Status = statusOK
	var failed error
	err = d.Verify(a.ctx, id, func(diff overlay2.Difference) {
		v.Status = statusDifferent
		if a.json {
			v.Differences = append(v.Differences, difference{diff.Path, diff.What})
		} else if failed == nil {
			diff.Path = printable(id + "/" + diff.Path)
			_, failed = fmt.Fprintln(a.out, diff)
		}
	})
	return v, errors.Join(err, failed)
}

// layersOf returns the layers that refs name, an image's from the lowest; all if there are no refs.
func (a *app) layersOf(refs []string) (ids []string, err error) {
	if len(refs) == 0 {
		layers, err := a.store.Layers()
		for _, l := range layers {
			if !l.Pending {
				ids = append(ids, l.ID)
			}
		}
		return ids, err
	}
	for _, ref := range refs {
		img, err := a.store.Image(ref)
		if err == nil {
			ids = append(ids, img.Layers...)
			continue
		}
		l, err2 := a.findLayer(ref)
		if errors.Is(err2, store.ErrNotFound) && !errors.Is(err, store.ErrNotFound) && !errors.Is(err, store.ErrName) {
			return nil, err
		}
		if err2 != nil {
			return nil, err2
		}
		ids = append(ids, l.ID)
	}
	return ids, nil
}
