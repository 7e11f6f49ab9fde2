//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

type commitFlags struct {
	name, message, author string
	replace               bool
}

func (a *app) commitCommand() *cobra.Command {
	var f commitFlags
	cmd := &cobra.Command{
		Use:   "commit ID",
		Short: "make an image of a layer: a new image layer of its changes, and a config",
		Long: `commit reads what the layer changes, as a tar, twice: once for its digest, once into a new
image layer. If somebody writes to the layer in between, the digests differ and nothing is left.
The layer itself stays as it is.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return a.commit(args[0], f) },
	}
	cmd.Flags().StringVar(&f.name, "name", "", "the image's name (needed)")
	cmd.Flags().StringVarP(&f.message, "message", "m", "", "comment in the image's history")
	cmd.Flags().StringVarP(&f.author, "author", "a", "", "author in the image's history")
	cmd.Flags().BoolVar(&f.replace, "replace", false, "give the name to this image if another has it")
	return cmd
}

func (a *app) commit(ref string, f commitFlags) error {
	if f.name == "" {
		return usagef("commit: the image needs a --name")
	}
	if err := store.CheckImageName(f.name); err != nil {
		return err
	}
	bars := a.newProgress()
	defer bars.wait()
	var r imported
	err := a.existingLocked(func(d *overlay2.Driver) (err error) {
		l, err := a.findLayer(ref)
		if err != nil {
			return err
		}
		if l.Kind != store.KindContainer {
			return fmt.Errorf("layer %q is an image's layer: there is nothing to commit", ref)
		}
		r, err = a.commitLayer(d, bars, l, f)
		return err
	})
	bars.wait()
	if err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return a.result(r, func(w io.Writer) error { return importText(w, []imported{r}) })
}

func (a *app) commitLayer(d *overlay2.Driver, bars *progress, l *store.Layer, f commitFlags) (imported, error) {
	// The nearest layer with a digest; containers between become part of the new layer.
	chain, err := a.store.Chain(l.ID)
	if err != nil {
		return imported{}, err
	}
	var below []digest.Digest // base first
	parent := ""
	for _, c := range chain {
		if c.Kind == store.KindImage {
			if parent == "" {
				parent = c.ID
			}
			below = append([]digest.Digest{c.DiffID}, below...)
		}
	}
	size, err := d.DiffSize(l.ID, parent)
	if err != nil {
		return imported{}, err
	}
	b := bars.add("reading", size)
	diffID, err := a.hashDiff(d, l.ID, parent, b)
	b.done(err)
	if err != nil {
		return imported{}, err
	}
	config, err := commitConfig(l.Config, append(below, diffID), f)
	if err != nil {
		return imported{}, err
	}
	img := &image.Image{Config: config, ConfigDigest: digest.FromBytes(config)}
	chainIDs := image.ChainIDs(append(below, diffID))
	for i, id := range below {
		img.Layers = append(img.Layers, image.Layer{DiffID: id, ChainID: chainIDs[i]})
	}
	top := image.TarLayer(diffID, func() (io.ReadCloser, error) { return d.Diff(l.ID, parent) })
	top.ChainID, top.Size = chainIDs[len(below)], -1
	img.Layers = append(img.Layers, top)
	r, err := a.importOne(d, bars, f.name, img, f.replace)
	if errors.Is(err, image.ErrDigest) || errors.Is(err, archive.ErrChanged) {
		// The tar's own digest was taken a moment ago: no image is damaged here, nor invalid.
		return r, fmt.Errorf("layer %s: %w: %s", l.ID, archive.ErrChanged, err.Error())
	}
	return r, err
}

// hashDiff returns the digest of a layer's tar.
func (a *app) hashDiff(d *overlay2.Driver, id, parent string, b bar) (_ digest.Digest, err error) {
	r, err := d.Diff(id, parent)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	h := digest.SHA256.Digester()
	_, err = a.copy(&shownWriter{h.Hash(), b, 0}, r)
	return h.Digest(), err
}

// shownWriter moves a bar by what is written.
type shownWriter struct {
	io.Writer
	bar bar
	n   int64
}

func (s *shownWriter) Write(p []byte) (int, error) {
	n, err := s.Writer.Write(p)
	s.n += int64(n)
	s.bar.set(s.n)
	return n, err
}

// commitConfig returns the base image's config with the new layer's diff id and a line of
// history. What this program does not know in it stays.
func commitConfig(base store.Config, diffIDs []digest.Digest, f commitFlags) ([]byte, error) {
	c := map[string]json.RawMessage{}
	if base != "" {
		if err := json.Unmarshal([]byte(base), &c); err != nil {
			return nil, fmt.Errorf("%w: config: %w", image.ErrInvalid, err)
		}
	} else {
		c["os"], c["architecture"] = json.RawMessage(`"linux"`), json.RawMessage(`"`+runtime.GOARCH+`"`)
	}
	var history []json.RawMessage
	if raw := c["history"]; raw != nil {
		if err := json.Unmarshal(raw, &history); err != nil {
			return nil, fmt.Errorf("%w: config: history: %w", image.ErrInvalid, err)
		}
	}
	created := now()
	entry, err := json.Marshal(v1.History{Created: &created, CreatedBy: "overlay2 commit", Author: f.author, Comment: f.message})
	if err != nil {
		return nil, err
	}
	return setConfig(c, map[string]any{
		"created": created,
		"history": append(history, entry),
		"rootfs":  v1.RootFS{Type: "layers", DiffIDs: diffIDs},
	})
}

// withDiffIDs returns the config with other diff ids.
func withDiffIDs(config []byte, diffIDs []digest.Digest) ([]byte, error) {
	c := map[string]json.RawMessage{}
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("%w: config: %w", image.ErrInvalid, err)
	}
	return setConfig(c, map[string]any{"rootfs": v1.RootFS{Type: "layers", DiffIDs: diffIDs}})
}

func setConfig(c map[string]json.RawMessage, values map[string]any) (_ []byte, err error) {
	for key, v := range values {
		if c[key], err = json.Marshal(v); err != nil {
			return nil, err
		}
	}
	return json.Marshal(c) // keys sorted: the same values, the same bytes
}
