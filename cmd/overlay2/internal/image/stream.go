package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// maxZstdWindow bounds the memory a zstd frame may ask for: what zstd --ultra -22 needs.
const maxZstdWindow = 128 << 20

// Stream is the plain tar of a layer, verified while it is read: io.EOF comes only when
// the stored bytes had the blob's size and digest and the tar the diff id.
type Stream struct {
	stored   *countReader
	packed   *bufio.Reader
	plain    io.Reader
	blob     *sum // nil: the source gives no digest of the stored bytes
	diff     *sum
	layer    Layer
	err      error
	closers  []func() error
	plainLen int64
}

// sum is a digest in the making, with what it must come to.
type sum struct {
	want digest.Digest
	hash hash.Hash
}

func newSum(want digest.Digest) *sum {
	return &sum{want: want, hash: want.Algorithm().Hash()}
}

func (s *sum) check(what string) error {
	if got := digest.NewDigest(s.want.Algorithm(), s.hash); got != s.want {
		return fmt.Errorf("%w: %s is %s, not %s", ErrDigest, what, got, s.want)
	}
	return nil
}

// countReader counts what passes, for a progress bar in another goroutine, and ends when ctx does.
type countReader struct {
	ctx context.Context
	r   io.Reader
	n   atomic.Int64
	sum *sum
}

func (c *countReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	if c.sum != nil {
		c.sum.hash.Write(p[:n])
	}
	return n, err
}

// Open returns the layer's plain tar. ctx ends it.
func (l Layer) Open(ctx context.Context) (*Stream, error) {
	if l.open == nil {
		return nil, fmt.Errorf("layer %s: the tar is %w", l.DiffID, ErrMissing)
	}
	f, err := l.open()
	if err != nil {
		return nil, err
	}
	s := &Stream{layer: l, closers: []func() error{f.Close}}
	s.stored = &countReader{ctx: ctx, r: f}
	if l.Blob != "" {
		s.blob = newSum(l.Blob)
		s.stored.sum = s.blob
	}
	if l.DiffID != "" {
		s.diff = newSum(l.DiffID)
	}
	s.packed = bufio.NewReaderSize(s.stored, 1<<18)
	if l.plain {
		s.plain = s.packed
		return s, nil
	}
	plain, closer, err := decompress(s.packed)
	if err != nil {
		return nil, errors.Join(s.wrap(err), s.Close())
	}
	s.plain = plain
	s.closers = append(s.closers, closer)
	return s, nil
}

// Stored returns how many of the stored, perhaps compressed, bytes have been read. It
// may be called while another goroutine reads.
func (s *Stream) Stored() int64 { return s.stored.n.Load() }

// Size returns the length of the plain tar so far.
func (s *Stream) Size() int64 { return s.plainLen }

// Verified reports whether the whole layer was read and every digest was right.
func (s *Stream) Verified() bool { return s.err == io.EOF }

// Read reads the plain tar.
func (s *Stream) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.plain.Read(p)
	s.plainLen += int64(n)
	if s.diff != nil {
		s.diff.hash.Write(p[:n])
	}
	if err == io.EOF {
		err = s.finish()
	}
	if err != nil && err != io.EOF {
		err = s.wrap(err)
	}
	s.err = err
	return n, err
}

// finish checks what can only be known at the end. io.EOF is success.
func (s *Stream) finish() error {
	// Bytes behind the compressed stream belong to the blob, too.
	if _, err := io.Copy(io.Discard, s.packed); err != nil {
		return err
	}
	if n := s.Stored(); s.layer.Size >= 0 && n != s.layer.Size {
		return fmt.Errorf("%w: the blob has %d bytes, not %d", ErrDigest, n, s.layer.Size)
	}
	if s.blob != nil {
		if err := s.blob.check("the blob"); err != nil {
			return err
		}
	}
	if s.diff != nil {
		if err := s.diff.check("the tar"); err != nil {
			return err
		}
	}
	return io.EOF
}

func (s *Stream) wrap(err error) error {
	name := s.layer.Blob
	if name == "" {
		name = s.layer.DiffID
	}
	// A cut-off or garbled compressed stream is the image's fault and must be told as such.
	if !errors.Is(err, ErrDigest) && !errors.Is(err, ErrUnsupported) && s.stored.ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return fmt.Errorf("layer %s: %w", name, err)
}

// Close releases the files and the decompressor. Reading the rest is not needed.
func (s *Stream) Close() error {
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i]())
	}
	s.closers = nil
	if s.err == nil {
		s.err = errors.New("layer is closed")
	}
	return errors.Join(errs...)
}

// Compression of a stream, found by its first bytes: media types are often wrong.
type compression string

const (
	plain  compression = ""
	gzipc  compression = "gzip"
	zstdc  compression = "zstd"
	bzip2c compression = "bzip2"
	xzc    compression = "xz"
)

func sniff(b []byte) compression {
	has := func(magic string) bool { return len(b) >= len(magic) && string(b[:len(magic)]) == magic }
	switch {
	case has("\x1f\x8b"):
		return gzipc
	case has("\x28\xb5\x2f\xfd"), len(b) >= 4 && b[0]>>4 == 5 && string(b[1:4]) == "\x2a\x4d\x18":
		return zstdc // the second is a skippable frame, with which seekable zstd may begin
	case has("BZh"):
		return bzip2c
	case has("\xfd7zXZ\x00"):
		return xzc
	}
	return plain
}

// decompress returns the plain form of r and a function that frees the decompressor.
func decompress(r *bufio.Reader) (io.Reader, func() error, error) {
	head, err := r.Peek(6)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	switch c := sniff(head); c {
	case plain:
		return r, func() error { return nil }, nil
	case gzipc:
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	case zstdc:
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.WithDecoderConcurrency(2))
		if err != nil {
			return nil, nil, err
		}
		return z, func() error { z.Close(); return nil }, nil
	default:
		return nil, nil, fmt.Errorf("%w compression %s", ErrUnsupported, c)
	}
}
