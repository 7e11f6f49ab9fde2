//go:build linux

package overlay2

import (
	"errors"
	"io"
	"sync"

	"github.com/bcc2decd/overlay2/archive"
)

// Files opens files of a layer by the names that they have in its Diff. The layer cannot be removed
// until it is closed.
type Files struct {
	id    string
	files *archive.Files
	once  sync.Once
	done  func() error
}

// Files opens the layer for reading single files without a mount: what tar-split needs to put the very tar together
// again from which the layer was made. It may be used by several goroutines. Close it. Where upper directories
// do not tell all that has changed (before Linux 4.8, see Status) it is ErrNotSupported.
func (d *Driver) Files(id string) (*Files, error) {
	f, err := d.files(id)
	if err != nil {
		return nil, layerErr("files", id, err)
	}
	return f, nil
}

func (d *Driver) files(id string) (*Files, error) {
	parent, err := d.parent(id)
	if err != nil {
		return nil, err
	}
	c, err := d.compareNative(id, parent)
	if err != nil {
		return nil, err
	}
	if !c.native {
		return nil, unsupported("the kernel's upper directories do not tell all that changed")
	}
	files, err := archive.OpenFiles(c.dir, archive.ReadOptions{Format: d.format, Lowers: c.lowers})
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	return &Files{id: id, files: files, done: c.close}, nil
}

// parent returns the ID of a layer's parent, "" for none.
func (d *Driver) parent(id string) (string, error) {
	l, err := openLayer(d.home, id)
	if err != nil {
		return "", err
	}
	defer l.close()
	links, err := l.lowers()
	if err != nil || len(links) == 0 {
		return "", err
	}
	ids, err := resolve(d.home, links[:1]) // comparing looks at the others
	if err != nil {
		return "", err
	}
	return ids[0], nil
}

// Open opens the content of a regular file by its name in the tar, as archive.OpenFile does.
func (f *Files) Open(name string) (io.ReadCloser, error) {
	r, err := f.files.Open(name)
	if err != nil {
		return nil, layerErr("files", f.id, err)
	}
	return r, nil
}

// Close releases the layer. More than one call is harmless.
func (f *Files) Close() error {
	err := f.files.Close()
	f.once.Do(func() { err = errors.Join(err, f.done()) })
	return layerErr("files", f.id, err)
}
