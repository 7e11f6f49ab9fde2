package image

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Compressions that a Writer knows, by the names of the command line.
const (
	CompressNone = "none"
	CompressGzip = "gzip"
	CompressZstd = "zstd"
)

// Writer writes one image as an OCI layout to a new directory. Abort removes it unless
// Finish came first.
type Writer struct {
	dir    string
	layers []v1.Descriptor
	diffs  []digest.Digest
	done   bool
}

// NewWriter begins a layout in dir, which must be an empty directory.
func NewWriter(dir string) (*Writer, error) {
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return nil, err
	}
	return &Writer{dir: dir}, nil
}

// DiffIDs are the digests of the plain tars of the layers added so far.
func (w *Writer) DiffIDs() []digest.Digest { return w.diffs }

// AddLayer compresses and stores the plain tar r. A tar with another digest than want, if
// that is not empty, is ErrDigest and is not added. It returns the layer's descriptor.
func (w *Writer) AddLayer(ctx context.Context, r io.Reader, compress string, want digest.Digest) (v1.Descriptor, error) {
	types := map[string]string{CompressNone: v1.MediaTypeImageLayer, CompressGzip: v1.MediaTypeImageLayerGzip, CompressZstd: v1.MediaTypeImageLayerZstd}
	media, ok := types[compress]
	if !ok {
		return v1.Descriptor{}, fmt.Errorf("%w: compression %q", ErrUnsupported, compress)
	}
	diff := digest.SHA256.Digester()
	d, err := w.blob(media, func(out io.Writer) error {
		z, err := compressor(out, compress)
		if err != nil {
			return err
		}
		in := &countReader{ctx: ctx, r: r}
		if _, err := io.CopyBuffer(io.MultiWriter(z, diff.Hash()), in, make([]byte, 1<<20)); err != nil {
			return errors.Join(err, z.Close())
		}
		if got := diff.Digest(); want != "" && got != want {
			return errors.Join(fmt.Errorf("%w: the tar is %s, not %s", ErrDigest, got, want), z.Close())
		}
		return z.Close()
	})
	if err != nil {
		return v1.Descriptor{}, err
	}
	w.layers = append(w.layers, d)
	w.diffs = append(w.diffs, diff.Digest())
	return d, nil
}

func compressor(out io.Writer, compress string) (io.WriteCloser, error) {
	switch compress {
	case CompressGzip:
		return gzip.NewWriterLevel(out, gzip.DefaultCompression)
	case CompressZstd:
		// One encoder makes the same bytes on every machine.
		return zstd.NewWriter(out, zstd.WithEncoderConcurrency(1))
	}
	return nopCloser{out}, nil
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// blob stores what write produces under its digest.
func (w *Writer) blob(media string, write func(io.Writer) error) (d v1.Descriptor, err error) {
	f, err := os.CreateTemp(w.dir, ".blob-")
	if err != nil {
		return d, err
	}
	sum, buf := digest.SHA256.Digester(), bufio.NewWriterSize(f, 1<<18)
	err = write(io.MultiWriter(buf, sum.Hash()))
	if err == nil {
		err = buf.Flush()
	}
	if err == nil {
		err = f.Chmod(0o644)
	}
	var st os.FileInfo
	if err == nil {
		st, err = f.Stat()
	}
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	d = v1.Descriptor{MediaType: media, Digest: sum.Digest()}
	if err == nil {
		d.Size = st.Size()
		err = os.Rename(f.Name(), filepath.Join(w.dir, filepath.FromSlash(blobName(d.Digest))))
	}
	if err != nil {
		return v1.Descriptor{}, errors.Join(err, ignoreAbsent(os.Remove(f.Name())))
	}
	return d, nil
}

func (w *Writer) blobBytes(media string, b []byte) (v1.Descriptor, error) {
	return w.blob(media, func(out io.Writer) error {
		_, err := out.Write(b)
		return err
	})
}

// Finish writes the config, the manifest and the index. name may be empty. The config's
// diff ids must be those of the layers. It returns the manifest's digest.
func (w *Writer) Finish(config []byte, name string) (digest.Digest, error) {
	c, err := checkConfig(config)
	if err != nil {
		return "", err
	}
	if len(c.RootFS.DiffIDs) != len(w.diffs) {
		return "", fmt.Errorf("%w: config has %d layers, %d were written", ErrInvalid, len(c.RootFS.DiffIDs), len(w.diffs))
	}
	for i, id := range c.RootFS.DiffIDs {
		if id != w.diffs[i] {
			return "", fmt.Errorf("%w: layer %d is %s, the config says %s", ErrDigest, i, w.diffs[i], id)
		}
	}
	cd, err := w.blobBytes(v1.MediaTypeImageConfig, config)
	if err != nil {
		return "", err
	}
	layers := w.layers
	if layers == nil {
		layers = []v1.Descriptor{}
	}
	manifest, err := json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    cd,
		Layers:    layers,
	})
	if err != nil {
		return "", err
	}
	md, err := w.blobBytes(v1.MediaTypeImageManifest, manifest)
	if err != nil {
		return "", err
	}
	id := md.Digest
	md.Platform = &v1.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant}
	if c.OS == "" || c.Architecture == "" {
		md.Platform = nil
	}
	if name != "" {
		md.Annotations = map[string]string{containerdName: name, v1.AnnotationRefName: tagOf(name)}
	}
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{md}}
	saved := []saved{{Config: blobName(cd.Digest), RepoTags: repoTags(name), Layers: []string{}}}
	for _, l := range layers {
		saved[0].Layers = append(saved[0].Layers, blobName(l.Digest))
	}
	for _, f := range []struct {
		name string
		v    any
	}{
		{v1.ImageLayoutFile, v1.ImageLayout{Version: v1.ImageLayoutVersion}},
		{dockerArchive, saved}, // for docker load before 25
		{v1.ImageIndexFile, index},
	} {
		b, err := json.Marshal(f.v)
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(w.dir, f.name), b, 0o644); err != nil {
			return "", err
		}
	}
	w.done = true
	return id, nil
}

// Abort removes an unfinished layout.
func (w *Writer) Abort() error {
	if w.done {
		return nil
	}
	return os.RemoveAll(w.dir)
}

// tagOf returns the tag of a reference, "latest" for one without.
func tagOf(name string) string {
	name, _, _ = strings.Cut(name, "@")
	if i := strings.LastIndexByte(name, ':'); i >= 0 && !strings.Contains(name[i:], "/") {
		return name[i+1:]
	}
	return "latest"
}

// dockerName is what docker load accepts as a tag: a table, never changed.
var dockerName = regexp.MustCompile(`^([a-z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)

func repoTags(name string) []string {
	if name != "" && tagOf(name) == "latest" && !strings.HasSuffix(name, ":latest") {
		name += ":latest"
	}
	if dockerName.MatchString(name) {
		return []string{name}
	}
	return nil
}

// WriteTar writes the layout in dir as a tar: the same layout makes the same bytes.
func WriteTar(ctx context.Context, dir string, out io.Writer) error {
	tw := tar.NewWriter(out)
	// WalkDir goes in lexical order.
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		h := &tar.Header{Name: filepath.ToSlash(rel), Mode: 0o644, Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}
		if e.IsDir() {
			h.Name, h.Mode, h.Typeflag = h.Name+"/", 0o755, tar.TypeDir
			return tw.WriteHeader(h)
		}
		return copyFile(ctx, tw, h, path)
	})
	if err != nil {
		return err
	}
	return tw.Close()
}

func copyFile(ctx context.Context, tw *tar.Writer, h *tar.Header, path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if h.Size = st.Size(); h.Size >= 8<<30 {
		h.Format = tar.FormatPAX
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(tw, &countReader{ctx: ctx, r: f})
	return err
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
