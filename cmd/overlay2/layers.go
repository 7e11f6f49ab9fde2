//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/split"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"github.com/opencontainers/go-digest"
)

// haveLayer returns the layer if it is there and whole, else nil. Then nothing of it is left: what a crash
// interrupted is removed. Or again is set: its content was lost when power was cut, and it is to be filled again where
// it is, since layers may lie on it.
//
// A layer that is another one is ErrInvalid, and stays: the image wants a tar whose digest is that layer's id.
func (a *app) haveLayer(d *overlay2.Driver, id, parent string, diffID digest.Digest) (have *store.Layer, again bool, err error) {
	l, err := a.store.Layer(id)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, false, err
	}
	// An empty record tells neither.
	other := l != nil && l.DiffID != "" && (l.DiffID != diffID || l.Parent != parent)
	if other && !l.Pending {
		return nil, false, fmt.Errorf("%w: layer %s is there, of the tar %s over %q", image.ErrInvalid, id, l.DiffID, l.Parent)
	}
	switch exists := d.Exists(id); {
	case l == nil && !exists:
		return nil, false, nil
	case !exists, other:
		return nil, false, a.removeLayers(d, []string{id})
	}
	// The record alone does not tell: it may have reached the disk before the layer.
	switch whole, err := isWhole(d, id); {
	case err != nil:
		return nil, false, err
	case !whole:
		return nil, true, nil
	}
	if l != nil && !l.Pending {
		return l, false, nil
	}
	err = a.removeLayers(d, []string{id})
	if l == nil || !errors.Is(err, overlay2.ErrLayerInUse) {
		return nil, false, err
	}
	// It was filled again, beneath others, from a tar that was verified, and the import ended before its record said so.
	l.Parent, l.DiffID, l.Pending = parent, diffID, false
	if l.Size, err = d.DiffSize(id, parent); err != nil {
		return nil, false, err
	}
	return l, false, a.store.StageLayer(l)
}

// isWhole asks the driver whether a layer that is there has all its content.
func isWhole(d *overlay2.Driver, id string) (bool, error) {
	f, err := d.Files(id)
	switch {
	case err == nil:
		return true, f.Close()
	case errors.Is(err, overlay2.ErrIncomplete):
		return false, nil
	case errors.Is(err, overlay2.ErrNotSupported): // only of a whole layer
		return true, nil
	}
	return false, err
}

// removeLayers removes layers, the last first.
func (a *app) removeLayers(d *overlay2.Driver, ids []string) error {
	for i, id := range slices.Backward(ids) {
		// The record goes last: whatever has no record is no layer of ours.
		if err := d.Remove(id); err != nil {
			return errors.Join(err, a.store.DeleteLayers(ids[i+1:]...))
		}
	}
	return a.store.DeleteLayers(ids...)
}

// addLayer makes an image layer of a stream. It is whole and verified, or not there; one that is filled again may stay
// unfinished.
func (a *app) addLayer(d *overlay2.Driver, id, parent string, l image.Layer, again bool, b bar) (record *store.Layer, err error) {
	record = &store.Layer{ID: id, Parent: parent, Kind: store.KindImage, DiffID: l.DiffID, Created: now(), Pending: true}
	if err := a.store.StageLayer(record); err != nil {
		return nil, err
	}
	if !again {
		defer func() {
			if err != nil {
				err = errors.Join(err, a.removeLayers(d, []string{id}))
			}
		}()
		if err := d.Create(id, parent, nil); err != nil {
			return nil, err
		}
	}
	if err := a.fillLayer(d, record, l, b); err != nil {
		return nil, err
	}
	record.Pending = false
	return record, a.store.StageLayer(record)
}

// fillLayer unpacks the stream into the new layer, and keeps how to make its bytes again.
func (a *app) fillLayer(d *overlay2.Driver, record *store.Layer, l image.Layer, b bar) (err error) {
	stream, err := l.Open(a.ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	rec := split.Record(&shownReader{stream, stream, b}, a.store.SplitPath(record.ID))
	defer func() { err = errors.Join(err, rec.Close()) }()
	if record.Size, err = d.ApplyDiff(record.ID, record.Parent, rec); err != nil {
		return badTar(err, rec)
	}
	// The driver reads to the end; only there the digests are known.
	if _, err := io.Copy(io.Discard, rec); err != nil {
		return err
	}
	if !stream.Verified() {
		return fmt.Errorf("layer %s: %w: not read to its end", record.DiffID, image.ErrInvalid)
	}
	record.TarSize = stream.Size()
	m, err := d.GetMetadata(record.ID)
	if err != nil {
		return err
	}
	return rec.Keep(m["UpperDir"])
}

// badTar tells an image's fault from ours. A tar that makes no sense is most often not the
// one that was promised: reading the rest tells.
func badTar(err error, rest io.Reader) error {
	switch {
	case errors.Is(err, archive.ErrFormat):
		if _, verr := io.Copy(io.Discard, rest); verr != nil && !errors.Is(err, verr) {
			return fmt.Errorf("%w (%w)", verr, err)
		}
	case errors.Is(err, archive.ErrBreakout), errors.Is(err, archive.ErrInvalidWhiteout):
	default:
		return err
	}
	return fmt.Errorf("%w: %w", image.ErrInvalid, err)
}

// shownReader moves a bar by what a stream has read.
type shownReader struct {
	io.Reader
	stream *image.Stream
	bar    bar
}

func (s *shownReader) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	s.bar.set(s.stream.Stored())
	return n, err
}
