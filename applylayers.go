//go:build linux

package overlay2

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/sys"
)

// ApplyLayers makes the layers of an image, each over the one before and the first over parent ("" for
// none), and fills them at the same time, as many as there are processors. Their diffs are read
// by a goroutine each, so that what decompresses them runs at the same time too. It returns the size of
// each layer, as ApplyDiff does. What lies on disk in the end is the same as with Create and
// ApplyDiff one after the other: where a diff leaves something to the layers below, such as the mode of a
// directory that it does not list, it waits for them.
//
// On an error, that of the lowest layer that could not be filled, this layer and those above are
// removed; the sizes are those of the layers below, which stay. After a crash each layer is absent, empty as
// after Create, whole or ErrIncomplete, and it is whole only if those below are.
func (d *Driver) ApplyLayers(parent string, layers []LayerDiff) ([]int64, error) {
	if !d.facts.nativeDiff() {
		return d.applyInTurn(parent, layers)
	}
	for i, l := range layers {
		if err := d.Create(l.ID, parent, nil); err != nil {
			return nil, errors.Join(err, d.removeLayers(layers[:i]))
		}
		parent = l.ID
	}
	sizes, err := d.fillLayers(layers)
	if err != nil {
		err = errors.Join(err, d.removeLayers(layers[len(sizes):]))
	}
	return sizes, err
}

// applyInTurn is for kernels where a diff must be applied through a mount, as one that is over whole layers.
func (d *Driver) applyInTurn(parent string, layers []LayerDiff) (sizes []int64, err error) {
	for i, l := range layers {
		if err := d.Create(l.ID, parent, nil); err != nil {
			return sizes, err
		}
		size, err := d.ApplyDiff(l.ID, parent, l.Diff)
		if err != nil {
			return sizes, errors.Join(err, d.removeLayers(layers[i:i+1]))
		}
		sizes = append(sizes, size)
		parent = l.ID
	}
	return sizes, nil
}

// removeLayers removes layers of a chain, the uppermost first.
func (d *Driver) removeLayers(layers []LayerDiff) error {
	var errs []error
	for _, l := range slices.Backward(layers) {
		errs = append(errs, d.Remove(l.ID))
	}
	return errors.Join(errs...)
}

// errBelow is the failure of a layer whose parent could not be filled.
var errBelow = errors.New("a layer below could not be filled")

// filling is one layer of a chain that is being filled.
type filling struct {
	d     *Driver
	diff  LayerDiff
	state *layerState
	l     *layer
	below *filling      // nil for the first
	done  chan struct{} // closed when size and err are there
	size  int64
	err   error
}

// fillLayers fills a chain of layers that are empty, and returns the sizes of those that it could fill.
func (d *Driver) fillLayers(layers []LayerDiff) (sizes []int64, err error) {
	ids := make([]string, len(layers))
	for i, l := range layers {
		ids[i] = l.ID
	}
	states, unlock := d.layers.lockAll(ids)
	defer unlock()
	chain := make([]*filling, len(layers))
	defer func() {
		for _, f := range chain {
			f.close()
		}
	}()
	for i, l := range layers {
		f := &filling{d: d, diff: l, state: states[i], done: make(chan struct{})}
		if i > 0 {
			f.below = chain[i-1]
		}
		chain[i] = f
		if f.l, err = openLayer(d.home, l.ID); err != nil {
			return nil, layerErr("apply", l.ID, err)
		}
	}
	// The uppermost first: at no moment a layer is whole that has one below it that is not.
	for _, f := range slices.Backward(chain) {
		mounted, err := d.beginApply(f.l, f.state, f != chain[len(chain)-1])
		if err == nil && mounted {
			err = fmt.Errorf("%w: mounted", ErrLayerInUse)
		}
		if err != nil {
			return nil, layerErr("apply", f.diff.ID, err)
		}
	}
	return runFillings(chain)
}

// runFillings fills the layers of a chain. One begins only after those below have begun, so that what it
// waits for goes on. A failure stops the layers above.
func runFillings(chain []*filling) (sizes []int64, err error) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, runtime.GOMAXPROCS(0))
	ctx := context.Background()
	var cancels []context.CancelFunc
	defer func() {
		for _, cancel := range cancels {
			cancel()
		}
	}()
	for _, f := range chain {
		own, cancel := context.WithCancel(ctx)
		ctx = own
		cancels = append(cancels, cancel)
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			defer close(f.done)
			if f.size, f.err = f.fill(own); f.err != nil {
				cancel()
			}
		})
	}
	wg.Wait()
	for _, f := range chain {
		if f.err != nil {
			return sizes, layerErr("apply", f.diff.ID, f.err)
		}
		sizes = append(sizes, f.size)
	}
	return sizes, nil
}

// fill unpacks the layer's diff, and makes it whole after those below.
func (f *filling) fill(ctx context.Context) (int64, error) {
	links, err := f.l.lowers()
	if err != nil {
		return 0, err
	}
	ids, err := f.d.resolve(links)
	if err != nil {
		return 0, err
	}
	stats, err := archive.Unpack(ctx, f.l.path(diffName), f.diff.Diff, archive.UnpackOptions{
		Format:      f.d.format,
		IDMap:       f.d.opts.IDMap,
		Lowers:      diffPaths(f.d.home, ids),
		LowersReady: f.awaitBelow,
	})
	if err != nil {
		return 0, err
	}
	if err := f.awaitBelow(ctx); err != nil {
		return 0, err
	}
	if f.below != nil && !stats.Root {
		if err := f.takeRoot(); err != nil {
			return 0, err
		}
	}
	f.d.tellSkipped(f.l.id, stats)
	if err := f.d.recordApplied(ctx, f.l, diffPaths(f.d.home, ids)); err != nil {
		return 0, err
	}
	return stats.Size, f.d.endApply(f.l)
}

// awaitBelow returns when the layers below are whole.
func (f *filling) awaitBelow(ctx context.Context) error {
	if f.below == nil {
		return nil
	}
	select {
	case <-f.below.done:
	case <-ctx.Done():
		<-f.below.done // soon: it is what has failed
	}
	if f.below.err != nil {
		return errBelow
	}
	return ctx.Err()
}

// takeRoot gives the layer's root the metadata of its parent's, which were not known when it was made.
func (f *filling) takeRoot() error {
	src, err := sys.OpenDirat(f.below.l.fd, diffName)
	if err != nil {
		return err
	}
	defer func() { _ = sys.Close(src) }()
	dst, err := sys.OpenDirat(f.l.fd, diffName)
	if err != nil {
		return err
	}
	_, _, err = sys.CopyDirMetadata(dst, src)
	return errors.Join(err, sys.Close(dst))
}

func (f *filling) close() {
	if f != nil && f.l != nil {
		f.l.close()
	}
}
