package image

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Options say how a source is to be read.
type Options struct {
	// Kind is one of the kinds of sources, or empty: then the content decides.
	Kind string
	// Platform chooses from an index.
	Platform Platform
	// Ref, if set, says that only images of this name are wanted. Others are not read if the source tells the names
	// without that.
	Ref string
	// TempDir is where a compressed archive and standard input are laid out for random
	// access, as files without a name.
	TempDir string
	// Stdin is what the path "-" reads.
	Stdin io.Reader
	// Progress, if set, is called with the bytes read of the source while it is looked
	// through, before layers are read.
	Progress func(read int64)
}

// Open opens the image source at path: an OCI layout (directory or tar), a docker-save
// archive, or a root filesystem's tar; tars may be compressed with gzip or zstd.
func Open(ctx context.Context, path string, opts Options) (*Source, error) {
	opts.Platform = opts.Platform.orHost()
	if path == "-" {
		f, err := spool(ctx, &patient{ctx: ctx, r: opts.Stdin}, opts)
		if err != nil {
			return nil, err
		}
		return openFile(ctx, f, opts)
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		return openDir(ctx, path, opts)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is neither a file nor a directory (to read a pipe, name it -)", ErrInvalid, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return openFile(ctx, f, opts)
}

// openDir opens an OCI layout, or an unpacked docker-save archive.
func openDir(ctx context.Context, path string, opts Options) (*Source, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	kind := opts.Kind
	if kind == "" {
		for _, c := range []struct{ file, kind string }{{v1.ImageLayoutFile, KindOCI}, {dockerArchive, KindDocker}} {
			if _, err := root.Lstat(c.file); err == nil {
				kind = c.kind
				break
			}
		}
	}
	if kind != KindOCI && kind != KindDocker {
		err := fmt.Errorf("%w: directory %s holds neither oci-layout nor manifest.json", ErrInvalid, filepath.Clean(path))
		return nil, errors.Join(err, root.Close())
	}
	return openSet(ctx, dirFiles{root}, kind, opts)
}

// openSet reads the images of a set of files, which it owns from now on.
func openSet(ctx context.Context, set files, kind string, opts Options) (s *Source, err error) {
	s = &Source{Kind: kind, closers: []io.Closer{set}}
	if kind == KindOCI {
		var named bool
		s.Images, named, err = layout{ctx, set, opts.Platform, &configs{}}.images(opts.Ref)
		if err == nil && !named {
			err = addSavedNames(ctx, set, s.Images)
		}
	} else {
		s.Images, err = dockerImages(ctx, set, opts.Ref)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// openFile opens an archive, which it owns from now on.
func openFile(ctx context.Context, f *os.File, opts Options) (s *Source, err error) {
	defer func() {
		if err != nil && f != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	kind := opts.Kind
	if kind != KindRootfs {
		v, err := kindOf(ctx, f, opts)
		if err != nil {
			return nil, err
		}
		if v == isRootfs {
			if kind != "" {
				return nil, fmt.Errorf("%w: the archive is no %s image", ErrInvalid, kind)
			}
			kind = KindRootfs
		}
	}
	if kind == KindRootfs {
		return openRootfs(ctx, f, opts)
	}
	set, err := openArchive(ctx, f, opts)
	if err != nil {
		return nil, err
	}
	if kind == "" {
		kind = KindDocker
		if _, ok := set.members[v1.ImageLayoutFile]; ok {
			kind = KindOCI // newer docker save writes both; only OCI has the layers' digests
		}
	}
	src, err := openSet(ctx, set, kind, opts)
	if err != nil {
		// openSet has closed set.f, which may be f itself; a second Close would be an error.
		if set.f == f {
			f = nil
		}
		return nil, err
	}
	if set.f != f {
		src.closers = append(src.closers, f)
	}
	return src, nil
}

// kindOf looks through an archive for what it is.
func kindOf(ctx context.Context, f *os.File, opts Options) (verdict, error) {
	r := &countReader{ctx: ctx, r: f}
	br := bufio.NewReaderSize(r, 1<<16)
	head, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return 0, err
	}
	if sniff(head) == plain {
		// Without a buffer archive/tar seeks over bodies.
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return 0, err
		}
		return scanKind(ctx, f)
	}
	z, done, err := decompress(br)
	if err != nil {
		return 0, asInvalid(err)
	}
	v, err := scanKind(ctx, progressReader{z, r, opts.Progress})
	if derr := done(); err == nil {
		err = derr
	}
	return v, err
}

// progressReader tells how far the source has been read.
type progressReader struct {
	io.Reader
	from *countReader
	call func(int64)
}

func (p progressReader) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	if p.call != nil {
		p.call(p.from.n.Load())
	}
	return n, err
}

// openArchive returns random access to an archive, laid out plain beforehand if compressed.
func openArchive(ctx context.Context, f *os.File, opts Options) (*tarFiles, error) {
	head := make([]byte, 6)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if sniff(head[:n]) == plain {
		return indexTar(ctx, f)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	z, done, err := decompress(bufio.NewReaderSize(f, 1<<18))
	if err != nil {
		return nil, asInvalid(err)
	}
	opts.Progress = nil
	tmp, err := spool(ctx, z, opts)
	if err != nil {
		return nil, errors.Join(asInvalid(err), done())
	}
	if err := done(); err != nil {
		return nil, errors.Join(err, tmp.Close())
	}
	set, err := indexTar(ctx, tmp)
	if err != nil {
		return nil, errors.Join(err, tmp.Close())
	}
	return set, nil
}

// patient reads in another goroutine, so that a ctx ends the waiting for a reader that says
// nothing, such as a person at a terminal. Then the goroutine stays until the reader does say something.
type patient struct {
	ctx context.Context
	r   io.Reader
	buf []byte
	out chan result
}

type result struct {
	n   int
	err error
}

func (p *patient) Read(b []byte) (int, error) {
	if p.buf == nil {
		p.buf, p.out = make([]byte, 1<<18), make(chan result, 1)
	}
	b = b[:min(len(b), len(p.buf))]
	go func() {
		n, err := p.r.Read(p.buf[:len(b)])
		p.out <- result{n, err}
	}()
	select {
	case r := <-p.out:
		return copy(b, p.buf[:r.n]), r.err
	case <-p.ctx.Done():
		return 0, p.ctx.Err()
	}
}

// spool copies r to a file that has no name: whatever ends the process, nothing is left.
func spool(ctx context.Context, r io.Reader, opts Options) (*os.File, error) {
	tmp, err := os.CreateTemp(opts.TempDir, "spool-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(tmp.Name()); err != nil {
		return nil, errors.Join(err, tmp.Close())
	}
	src := &countReader{ctx: ctx, r: r}
	if _, err := io.Copy(tmp, progressReader{src, src, opts.Progress}); err != nil {
		return nil, errors.Join(err, tmp.Close())
	}
	if _, err := tmp.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(err, tmp.Close())
	}
	return tmp, nil
}

// openRootfs makes an image of one layer. Its diff id is computed by reading the tar once;
// the second reading, into the layer, is verified like any other.
func openRootfs(ctx context.Context, f *os.File, opts Options) (*Source, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	layer := Layer{Size: st.Size(), open: func() (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(f, 0, st.Size())), nil
	}}
	s, err := layer.Open(ctx)
	if err != nil {
		return nil, err
	}
	h := digest.SHA256.Digester()
	_, err = io.Copy(h.Hash(), progressReader{s, s.stored, opts.Progress})
	if err = errors.Join(err, s.Close()); err != nil {
		return nil, err
	}
	diff := h.Digest()
	p := opts.Platform
	config, err := json.Marshal(v1.Image{
		Platform: v1.Platform{OS: p.OS, Architecture: p.Arch, Variant: p.Variant},
		RootFS:   v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{diff}},
		History:  []v1.History{{CreatedBy: "overlay2 import"}},
	})
	if err != nil {
		return nil, err
	}
	img, err := newImage(config, []Layer{layer})
	if err != nil {
		return nil, err
	}
	return &Source{Kind: KindRootfs, Images: []*Image{img}, closers: []io.Closer{f}}, nil
}

// asInvalid marks an error of a decompressor, unless it is one of ours or of the system.
func asInvalid(err error) error {
	var perr *os.PathError
	if errors.Is(err, context.Canceled) || errors.Is(err, ErrUnsupported) || errors.As(err, &perr) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrInvalid, err)
}
