package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"
)

// files is a read-only set of named files: a directory or a tar archive. Names are
// slash-separated and relative. A name that leads out of the set is an error.
type files interface {
	// open returns the file and its length. An absent file is fs.ErrNotExist.
	open(name string) (io.ReadCloser, int64, error)
	io.Closer
}

// dirFiles is a directory. os.Root keeps every name, symlinks on the way too, beneath it.
type dirFiles struct{ root *os.Root }

func (d dirFiles) Close() error { return d.root.Close() }

func (d dirFiles) open(name string) (io.ReadCloser, int64, error) {
	f, err := d.root.OpenFile(name, os.O_RDONLY|openNonblock, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%w: %q is not a regular file", ErrInvalid, name)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, st.Size(), nil
}

// tarFiles is an uncompressed tar archive with random access: bodies are read where they lie.
type tarFiles struct {
	f       *os.File
	members map[string]member
}

// member is a file of an archive, or a link to another.
type member struct {
	offset, size int64
	link         string
}

func (t *tarFiles) Close() error { return t.f.Close() }

func (t *tarFiles) open(name string) (io.ReadCloser, int64, error) {
	if !fs.ValidPath(name) {
		return nil, 0, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	// docker save before 25 links a layer that it has written already.
	for range 8 {
		m, ok := t.members[name]
		if !ok {
			return nil, 0, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		if m.link == "" {
			return io.NopCloser(io.NewSectionReader(t.f, m.offset, m.size)), m.size, nil
		}
		name = m.link
	}
	return nil, 0, fmt.Errorf("%w: %q: too many links", ErrInvalid, name)
}

// These bound the memory of an index. An image archive has a few names a layer.
const (
	maxMembers = 1 << 17
	maxNames   = 32 << 20 // the names and links together
	maxName    = 4096     // a longer one is no file of an image: no path is
)

// verdict is what the names of an archive tell of its kind.
type verdict int

const (
	undecided verdict = iota
	isImage
	isRootfs
)

// judge says what one member's clean name tells. The files that make an archive an
// image stand at its top; a directory that every root filesystem has makes it none.
func judge(name string) verdict {
	switch top, _, _ := strings.Cut(name, "/"); top {
	case "oci-layout", "manifest.json":
		if top == name {
			return isImage
		}
	case "bin", "boot", "dev", "etc", "home", "lib", "lib32", "lib64", "media", "mnt", "opt",
		"proc", "root", "run", "sbin", "srv", "sys", "tmp", "usr", "var":
		return isRootfs
	}
	return undecided
}

// scanKind reads a tar until a name decides its kind. An archive without such a name is a
// root filesystem.
func scanKind(ctx context.Context, r io.Reader) (verdict, error) {
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		h, err := tr.Next()
		if err == io.EOF && n > 0 {
			return isRootfs, nil
		}
		if err == io.EOF {
			return 0, fmt.Errorf("%w: empty archive", ErrInvalid)
		}
		if err != nil {
			return 0, fmt.Errorf("%w: read archive: %w", ErrInvalid, err)
		}
		if v := judge(cleanMember(h.Name)); v != undecided {
			return v, nil
		}
	}
}

// indexTar reads the headers of the uncompressed archive f and keeps the places of the
// bodies. The last member of a name wins, as tar extracts it.
func indexTar(ctx context.Context, f *os.File) (*tarFiles, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	t := &tarFiles{f: f, members: map[string]member{}}
	names := 0
	tr := tar.NewReader(f) // seeks over bodies, so that its place after Next is the body's
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, err := tr.Next()
		if err == io.EOF {
			return t, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: read archive: %w", ErrInvalid, err)
		}
		if len(t.members) == maxMembers {
			return nil, fmt.Errorf("%w: more than %d files in the archive", ErrInvalid, maxMembers)
		}
		if len(h.Name) > maxName || len(h.Linkname) > maxName {
			continue
		}
		if names += len(h.Name) + len(h.Linkname); names > maxNames {
			return nil, fmt.Errorf("%w: names of more than %d bytes in the archive", ErrInvalid, maxNames)
		}
		name := cleanMember(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			if h.PAXRecords["GNU.sparse.major"] != "" || h.PAXRecords["GNU.sparse.map"] != "" {
				return nil, fmt.Errorf("%w: %q is stored sparse", ErrUnsupported, h.Name)
			}
			at, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			t.members[name] = member{offset: at, size: h.Size}
		case tar.TypeSymlink:
			t.members[name] = member{link: path.Join(path.Dir(name), h.Linkname)}
		case tar.TypeLink:
			t.members[name] = member{link: cleanMember(h.Linkname)}
		}
	}
}

// cleanMember makes "./a//b" and "/a/b" to "a/b". A name that climbs out keeps its "..",
// and no lookup finds it.
func cleanMember(name string) string {
	return strings.TrimPrefix(path.Clean(strings.TrimLeft(name, "/")), "/")
}

// blobName returns the place of a blob in an OCI layout. d must be valid.
func blobName(d digest.Digest) string {
	return "blobs/" + d.Algorithm().String() + "/" + d.Encoded()
}

// readSmall reads a whole file of at most limit bytes.
func readSmall(fs files, name string, limit int64) ([]byte, error) {
	r, size, err := openNamed(fs, name)
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, errors.Join(fmt.Errorf("%w: %q has %d bytes, more than %d", ErrInvalid, name, size, limit), r.Close())
	}
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, fmt.Errorf("read %q: %w", name, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%w: %q has more than %d bytes", ErrInvalid, name, limit)
	}
	return b, nil
}

// openNamed opens name and says ErrMissing of one that is not there, ErrInvalid of one that
// leads out.
func openNamed(set files, name string) (io.ReadCloser, int64, error) {
	r, size, err := set.open(name)
	switch {
	case err == nil:
		return r, size, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, 0, fmt.Errorf("%q is %w", name, ErrMissing)
	case errors.Is(err, ErrInvalid), errors.Is(err, ErrUnsupported):
		return nil, 0, err
	}
	return nil, 0, fmt.Errorf("%w: %w", ErrInvalid, err)
}
