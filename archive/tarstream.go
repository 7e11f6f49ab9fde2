package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
)

const (
	blockSize = 512
	// chunkSize is a multiple of blockSize: a chunk begins at a block, so that no header
	// is ever cut by a chunk's end. Larger ones gain nothing and cost memory (docs/performance.md).
	chunkSize = 256 << 10
	// firstChunk is the size of the first chunk, and most layers of a build need no other; each
	// further one is twice as large as the one before, up to chunkSize.
	firstChunk = 64 << 10
	// maxEmptyReads is the number of reads in a row that may give nothing.
	maxEmptyReads = 100
)

// chunk is a piece of the stream. Whoever holds a part of it holds a reference; with
// the last one it goes back to where it came from.
type chunk struct {
	buf  []byte
	refs atomic.Int32
	free func(*chunk)
}

func (c *chunk) retain() { c.refs.Add(1) }

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 {
		c.free(c)
	}
}

// stream reads a tar into chunks, of which the bodies of files are written to disk
// without being copied again.
type stream struct {
	ctx context.Context
	r   io.Reader
	// alloc returns a chunk with one reference. It may wait for one to become free.
	alloc func() (*chunk, error)
	// onRead is called after each read.
	onRead func()

	cur      *chunk
	pos, end int
	// off is the number of bytes read from r.
	off int64
	// err is what r ended with; it counts once the bytes before it are used up.
	err error
}

// fill reads once from r, behind what is there. It returns an error only when nothing was read.
func (s *stream) fill() error {
	if s.err != nil {
		return s.err
	}
	if s.cur == nil || s.end == len(s.cur.buf) {
		next, err := s.alloc()
		if err != nil {
			return err
		}
		s.close()
		s.cur, s.pos, s.end = next, 0, 0
	}
	for range maxEmptyReads {
		if err := s.ctx.Err(); err != nil {
			return err
		}
		space := s.cur.buf[s.end:]
		n, err := s.r.Read(space)
		if n < 0 || n > len(space) {
			return errors.New("reader returned an impossible count")
		}
		s.end += n
		s.off += int64(n)
		s.err = err
		if s.onRead != nil {
			s.onRead()
		}
		if n > 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
	s.err = io.ErrNoProgress
	return s.err
}

// used returns the number of bytes of the stream that were consumed.
func (s *stream) used() int64 { return s.off - int64(s.end-s.pos) }

// block returns the next block, valid until the next call. It is io.EOF if the stream
// ends before it and io.ErrUnexpectedEOF if it ends within.
func (s *stream) block() ([]byte, error) {
	for s.cur == nil || s.end-s.pos < blockSize {
		partial := s.cur != nil && s.end > s.pos
		if err := s.fill(); err != nil {
			if err == io.EOF && partial {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	b := s.cur.buf[s.pos : s.pos+blockSize]
	s.pos += blockSize
	return b, nil
}

// rest returns what was read and not yet taken, valid until the next call.
func (s *stream) rest() []byte {
	if s.cur == nil {
		return nil
	}
	return s.cur.buf[s.pos:s.end]
}

// some returns between one and limit of the next bytes, as many as the chunk has room
// for. They lie in s.cur. The end of the stream is io.ErrUnexpectedEOF.
func (s *stream) some(limit int64) ([]byte, error) {
	for s.cur == nil || (int64(s.end-s.pos) < limit && s.end < len(s.cur.buf)) || s.pos == s.end {
		if err := s.fill(); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	n := int(min(limit, int64(s.end-s.pos)))
	b := s.cur.buf[s.pos : s.pos+n]
	s.pos += n
	return b, nil
}

// skip passes over n bytes.
func (s *stream) skip(n int64) error {
	for n > 0 {
		b, err := s.some(n)
		if err != nil {
			return err
		}
		n -= int64(len(b))
	}
	return nil
}

// drain reads the stream to its end. What follows the end of the archive is padding
// (GNU tar and bsdtar fill a record), and a pipe's writer waits until it is read.
func (s *stream) drain() error {
	if s.cur != nil {
		// Files still being written may lie in this chunk: go on in one of our own.
		s.end = len(s.cur.buf)
	}
	for {
		err := s.fill()
		s.pos, s.end = 0, 0
		if err != nil {
			if err == io.EOF {
				return nil
			}
			return err
		}
	}
}

// close gives the current chunk back.
func (s *stream) close() {
	if s.cur != nil {
		s.cur.release()
		s.cur = nil
	}
}

// malformed returns an ErrFormat with a detail.
func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrFormat}, args...)...)
}

// eofUnexpected says that the stream must not end here.
func eofUnexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
