//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/split"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func (a *app) exportCommand() *cobra.Command {
	var to, compress string
	cmd := &cobra.Command{
		Use:   "export IMAGE --to DIR|FILE.tar",
		Short: "write an image as an OCI layout: a directory, or a tar of one",
		Long: `export writes an image as an OCI image layout that other tools read: to a directory that
must not be there or be empty, or, where the name ends in .tar, to an archive, which docker load
reads too; "-" is an archive on standard output.

Layers that were imported come out with the digests they came with: the same image, the same id.
Where a layer's tar could never be made again byte for byte (an entry replaced by a later one of
the same name, a sparse file) it is packed anew, the config gets its digest, and export says so.
Where it could, and does not have its digest any more, the layer is damaged, and nothing is written.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return a.export(args[0], to, compress) },
	}
	cmd.Flags().StringVar(&to, "to", "", "directory, FILE.tar or - (needed)")
	cmd.Flags().StringVar(&compress, "compress", image.CompressGzip, "layers' compression: gzip, zstd or none")
	return cmd
}

// exported is export's result.
type exported struct {
	Name     string        `json:"name"`
	ID       string        `json:"id"`
	To       string        `json:"to"`
	Manifest digest.Digest `json:"manifest"`
	Layers   []string      `json:"layers"`
	// Repacked are the layers whose digest is new.
	Repacked []string `json:"repacked"`
}

func (a *app) export(name, to, compress string) error {
	archive := to == "-" || strings.HasSuffix(to, ".tar")
	switch {
	case to == "":
		return usagef("export: it needs --to")
	case compress != image.CompressNone && compress != image.CompressGzip && compress != image.CompressZstd:
		return usagef("export: unknown compression %q: gzip, zstd or none", compress)
	case to == "-" && isTerminal(a.out):
		return usagef("export: an archive is not for a terminal: redirect it")
	case to == "-" && a.json:
		return usagef("export: --json needs a file: standard output is the archive's")
	}
	if !archive {
		if err := checkEmpty(to); err != nil {
			return fmt.Errorf("export: %w", err)
		}
	}
	bars := a.newProgress()
	defer bars.wait()
	var r exported
	err := a.existing(func(d *overlay2.Driver) error {
		img, err := a.image(name)
		if err != nil {
			return err
		}
		r, err = a.exportImage(d, bars, img, to, compress, archive)
		return err
	})
	bars.wait()
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	for _, id := range r.Repacked {
		a.remark("layer %s was packed anew: its digest, and the image's id, are new", short(id))
	}
	if to == "-" {
		return nil
	}
	return a.result(r, line("%s  %s  %d layers  %s", r.Name, short(r.ID), len(r.Layers), r.To))
}

// checkEmpty refuses a directory with something in it.
func checkEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return fmt.Errorf("directory %s %w and is not empty", dir, store.ErrExists)
	}
	return nil
}

// exportImage writes the layout beside its place and moves it there when it is whole.
func (a *app) exportImage(d *overlay2.Driver, bars *progress, img *store.Image, to, compress string, archive bool) (r exported, err error) {
	r = exported{Name: img.Name, To: to, Layers: []string{}, Repacked: []string{}}
	tmp, done, err := a.exportDir(to)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, done()) }()
	w, err := image.NewWriter(tmp)
	if err != nil {
		return r, err
	}
	for i, id := range img.Layers {
		l, err := a.store.Layer(id)
		if err != nil {
			return r, err
		}
		b := bars.add(fmt.Sprintf("layer %d/%d", i+1, len(img.Layers)), l.TarSize)
		anew, err := a.exportLayer(d, w, l, compress, b)
		b.done(err)
		if err != nil {
			return r, fmt.Errorf("layer %s: %w", short(id), err)
		}
		if anew {
			r.Repacked = append(r.Repacked, id)
		}
	}
	config := []byte(img.Config)
	if len(r.Repacked) > 0 {
		if config, err = withDiffIDs(config, w.DiffIDs()); err != nil {
			return r, err
		}
	}
	if r.Manifest, err = w.Finish(config, img.Name); err != nil {
		return r, err
	}
	r.ID = digest.FromBytes(config).Encoded()
	for _, id := range w.DiffIDs() {
		r.Layers = append(r.Layers, id.String())
	}
	if !archive {
		if err := os.Chmod(tmp, 0o755); err != nil {
			return r, err
		}
		return r, os.Rename(tmp, filepath.Clean(to)) // onto an empty directory too
	}
	return r, a.exportArchive(bars, tmp, to)
}

// exportDir makes the directory that the layout is written to, and returns what removes it: beside its place, or for standard
// output in the store.
func (a *app) exportDir(to string) (path string, done func() error, err error) {
	if to == "-" {
		tmp, err := a.store.MakeTemp()
		if err != nil {
			return "", nil, err
		}
		return tmp.Path, tmp.Close, nil
	}
	path, err = os.MkdirTemp(filepath.Dir(filepath.Clean(to)), ".overlay2-export-")
	return path, func() error { return os.RemoveAll(path) }, err
}

// exportArchive writes the layout in dir as a tar.
func (a *app) exportArchive(bars *progress, dir, to string) error {
	b := bars.add("archive", 0)
	pr, pw := io.Pipe()
	ctx, cancel := context.WithCancel(a.ctx)
	defer cancel()
	go func() { pw.CloseWithError(image.WriteTar(ctx, dir, pw)) }()
	var err error
	if to == "-" {
		_, err = a.copy(&shownWriter{a.out, b, 0}, pr)
	} else {
		_, err = a.copyToFile(to, &countedReader{pr, b, 0})
	}
	err = errors.Join(err, pr.Close())
	b.done(err)
	return err
}

// countedReader moves a bar by what is read.
type countedReader struct {
	io.Reader
	bar bar
	n   int64
}

func (s *countedReader) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	s.n += int64(n)
	s.bar.set(s.n)
	return n, err
}

// exportLayer writes one layer: as the very tar it was, if that could be made again when it was imported, else packed anew.
func (a *app) exportLayer(d *overlay2.Driver, w *image.Writer, l *store.Layer, compress string, b bar) (anew bool, err error) {
	again := func(r io.ReadCloser, want digest.Digest) error {
		_, err := w.AddLayer(a.ctx, &countedReader{r, b, 0}, compress, want)
		return errors.Join(err, r.Close())
	}
	path := a.store.SplitPath(l.ID)
	if _, err := os.Lstat(path); err == nil {
		return false, a.replay(d, l.ID, func(dir string) error {
			r, err := split.Replay(path, dir)
			if err != nil {
				return fmt.Errorf("%w: %w", image.ErrDigest, err)
			}
			return again(damaged{r}, l.DiffID)
		})
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	r, err := d.Diff(l.ID, l.Parent)
	if err != nil {
		return false, err
	}
	if err := again(r, ""); err != nil {
		return false, err
	}
	ids := w.DiffIDs()
	return ids[len(ids)-1] != l.DiffID, nil
}

// replay calls f with the directory of a layer, which is whole and stays as long.
func (a *app) replay(d *overlay2.Driver, id string, f func(dir string) error) error {
	m, err := d.GetMetadata(id)
	if err != nil {
		return err
	}
	files, err := d.Files(id)
	if errors.Is(err, overlay2.ErrNotSupported) {
		return f(m["UpperDir"])
	}
	if err != nil {
		return err
	}
	return errors.Join(f(m["UpperDir"]), files.Close())
}

// damaged is the tar of a layer. If it cannot be read to its end the layer is not what it was.
type damaged struct{ io.ReadCloser }

func (d damaged) Read(p []byte) (int, error) {
	n, err := d.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%w: %w", image.ErrDigest, err)
	}
	return n, err
}
