//go:build linux

package overlay2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/sys"
)

// pair looks at a layer and the parent that a call names for it: native is true if it is the
// direct parent (or both have none), so that the layer's diff directory alone tells the difference.
// Lowers are the diff directories below the layer.
func (d *Driver) pair(l *layer, parent string) (lowers []string, native bool, err error) {
	ids, err := d.ancestors(l)
	if err != nil {
		return nil, false, err
	}
	if err := l.checkDiff(); err != nil {
		return nil, false, err
	}
	if err := d.checkSynced(l); err != nil {
		return nil, false, err
	}
	switch {
	case len(ids) == 0:
		native = parent == ""
	case ids[0] == parent:
		native = true
	}
	if !native && parent != "" {
		p, err := openLayer(d.home, parent)
		if err != nil {
			return nil, false, fmt.Errorf("parent %s: %w", parent, err)
		}
		p.close()
	}
	return diffPaths(d.home, ids), native && d.facts.nativeDiff(), nil
}

// comparison is a layer opened for reading against a parent. It cannot be removed until close.
type comparison struct {
	native bool
	// For a native comparison: the layer's diff directory and those below it.
	dir    string
	lowers []string
	final  knownSize // see Driver.final
	// Otherwise: where the layer and the parent, unless that is none, are mounted, and since when they may differ.
	merged, parent string
	since          time.Time
	close          func() error
}

// compare opens a layer for reading against a parent.
func (d *Driver) compare(id, parent string) (*comparison, error) {
	c, err := d.compareNative(id, parent)
	if err != nil || c.native {
		return c, err
	}
	if c.merged, err = d.get(id, ""); err != nil {
		return nil, err
	}
	c.close = func() error { return d.put(id) }
	if parent == "" {
		return c, nil
	}
	if c.parent, err = d.get(parent, ""); err != nil {
		return nil, errors.Join(fmt.Errorf("parent %s: %w", parent, err), c.close())
	}
	c.close = func() error { return errors.Join(d.put(parent), d.put(id)) }
	if c.since, err = d.forkedAt(id, parent); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

// compareNative opens a layer for reading its diff directory alone, if that is enough.
func (d *Driver) compareNative(id, parent string) (_ *comparison, err error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	state, unlock := d.layers.lock(id)
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
	c := &comparison{dir: l.path(diffName), close: func() error { reader.drop(); return nil }}
	defer func() {
		if err != nil || !c.native {
			reader.drop()
		}
	}()
	if err := l.checkWhole(); err != nil {
		return nil, err
	}
	if c.lowers, c.native, err = d.pair(l, parent); err != nil {
		return nil, err
	}
	if c.native {
		if c.final, err = d.final(l, state); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// Diff returns what the layer changes of parent, as a tar with whiteouts. parent is mostly the
// layer's direct parent; with any other layer, or "" for the whole tree, both are mounted and
// compared. The same layer gives the same bytes.
//
// Sparse files are in it with their zeros, unless Options.SparseDiffs says otherwise.
//
// The stream ends with io.EOF only if it is whole. It can be closed at any time, and must
// be; until then the layer cannot be removed or filled, by other processes neither. It is an io.WriterTo.
func (d *Driver) Diff(id, parent string) (io.ReadCloser, error) {
	r, err := d.diff(id, parent)
	if err != nil {
		return nil, layerErr("diff", id, err)
	}
	return r, nil
}

func (d *Driver) diff(id, parent string) (*diffReader, error) {
	c, err := d.compare(id, parent)
	if err != nil {
		return nil, err
	}
	r, err := d.pack(c, d.opts.SparseDiffs)
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	return &diffReader{Reader: r, id: id, done: c.close}, nil
}

// pack returns the tar of a comparison.
func (d *Driver) pack(c *comparison, sparse bool) (archive.Reader, error) {
	ctx := context.Background()
	if c.native {
		return archive.Pack(ctx, c.dir, archive.PackOptions{Format: d.format, IDMap: d.opts.IDMap, Lowers: c.lowers, NoSparse: !sparse})
	}
	opts := archive.PackOptions{Format: archive.Merged, IDMap: d.opts.IDMap, NoSparse: !sparse}
	if c.parent != "" {
		opts.Lowers = []string{c.parent} // for the root's own metadata
		changes, err := archive.CompareSince(ctx, c.merged, c.parent, c.since)
		if err != nil {
			return nil, err
		}
		opts.Changes = append([]archive.Change{}, changes...) // nil would be the whole tree
	}
	return archive.Pack(ctx, c.merged, opts)
}

// diffReader is the stream of a Diff, with what it holds until it is closed.
type diffReader struct {
	archive.Reader
	id   string
	once sync.Once
	done func() error
}

// Read returns the next part of the tar.
func (r *diffReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil && err != io.EOF {
		err = layerErr("diff", r.id, err)
	}
	return n, err
}

// WriteTo writes the rest of the tar.
func (r *diffReader) WriteTo(w io.Writer) (int64, error) {
	n, err := r.Reader.WriteTo(w)
	return n, layerErr("diff", r.id, err)
}

// Close releases the layer. More than one call is harmless.
func (r *diffReader) Close() error {
	err := r.Reader.Close()
	r.once.Do(func() { err = errors.Join(err, r.done()) })
	return layerErr("diff", r.id, err)
}

// DiffSize returns the size in bytes of what the layer adds to parent: the lengths of all
// files and symlinks in its Diff, hard links counted once.
func (d *Driver) DiffSize(id, parent string) (int64, error) {
	size, err := d.diffSize(id, parent)
	return size, layerErr("size", id, err)
}

func (d *Driver) diffSize(id, parent string) (size int64, err error) {
	c, err := d.compare(id, parent)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if c.native {
		return d.layerSize(c)
	}
	r, err := d.pack(c, true) // there is no need to read zeros
	if err != nil {
		return 0, err
	}
	_, err = r.WriteTo(io.Discard)
	return r.Stats().Size, errors.Join(err, r.Close())
}

// knownSize is what layerSize remembers of a layer, by its link.
type knownSize struct {
	link  string       // "" if nothing is to be remembered
	state sys.DirState // of the layer's directory
	size  int64
}

// layerSize returns the size of a layer's own files. That of a layer which nobody can write is
// remembered: under its link, which no other layer ever has, whoever removes and makes layers meanwhile, and until its
// directory changes, as it does when a diff is applied to it, by whomever.
func (d *Driver) layerSize(c *comparison) (int64, error) {
	if c.final.link == "" {
		stats, err := archive.Usage(context.Background(), c.dir)
		return stats.Size, err
	}
	if known, ok := d.sizes.Load(c.final.link); ok && known.(knownSize).state == c.final.state {
		return known.(knownSize).size, nil
	}
	stats, err := archive.Usage(context.Background(), c.dir)
	if err != nil {
		return 0, err
	}
	c.final.size = stats.Size
	d.sizes.Store(c.final.link, c.final)
	return stats.Size, nil
}

// final returns the link and the state of a layer that is committed and not mounted, so that it stays as it is unless a
// diff is applied to it when it has no children any more; else no link.
func (d *Driver) final(l *layer, state *layerState) (k knownSize, err error) {
	committed, err := l.has(committedName)
	if err != nil || !committed || state.mounts > 0 {
		return k, err
	}
	if mounted, err := l.mounted(); err != nil || mounted {
		return k, err
	}
	now := time.Now()
	if k.state, err = sys.StateFd(l.fd); err != nil || !k.state.SettledAt(now, d.known.settle) {
		return k, err
	}
	k.link, err = l.link()
	return k, err
}

// Changes returns what the layer changes of parent, sorted by path. The parents of what
// changed are Modified; of a deleted directory only itself is listed.
func (d *Driver) Changes(id, parent string) ([]archive.Change, error) {
	changes, err := d.changes(id, parent)
	return changes, layerErr("changes", id, err)
}

func (d *Driver) changes(id, parent string) (changes []archive.Change, err error) {
	c, err := d.compare(id, parent)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if c.native {
		return archive.Changes(context.Background(), c.dir, archive.ReadOptions{Format: d.format, Lowers: c.lowers})
	}
	return archive.CompareSince(context.Background(), c.merged, c.parent, c.since)
}
