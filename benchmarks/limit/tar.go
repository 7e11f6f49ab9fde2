//go:build linux

// Package limit does the jobs of a layer store with the fewest system calls and nothing
// else: no check of names, no marks made, no xattrs, no cleaning up after an error. It is
// the yardstick, not a way to treat a tar from a stranger.
package limit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync/atomic"
)

const (
	block     = 512
	chunkSize = 1 << 20
)

// chunk is a piece of the stream that slices of it keep alive.
type chunk struct {
	buf  []byte
	refs atomic.Int32
	pool chan *chunk
}

func (c *chunk) hold() { c.refs.Add(1) }

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 {
		c.pool <- c
	}
}

// stream hands out consecutive pieces of a reader without copying them, but for the
// tail of a chunk, which moves to the front of the next.
type stream struct {
	r        io.Reader
	pool     chan *chunk
	cur      *chunk
	off, end int
}

func newStream(r io.Reader, chunks int) *stream {
	s := &stream{r: r, pool: make(chan *chunk, chunks)}
	for range chunks {
		s.pool <- &chunk{buf: make([]byte, chunkSize), pool: s.pool}
	}
	s.cur = <-s.pool
	s.cur.hold()
	return s
}

// need returns the next n bytes, at most chunkSize.
func (s *stream) need(n int) ([]byte, error) {
	if s.end-s.off < n {
		next := <-s.pool
		next.hold()
		have := copy(next.buf, s.cur.buf[s.off:s.end])
		s.cur.release()
		s.cur, s.off, s.end = next, 0, have
		got, err := io.ReadAtLeast(s.r, next.buf[have:], n-have)
		s.end += got
		if err != nil {
			return nil, err
		}
	}
	p := s.cur.buf[s.off : s.off+n]
	s.off += n
	return p, nil
}

// some returns between 1 and n of the next bytes, as many as are there.
func (s *stream) some(n int) ([]byte, error) {
	if have := s.end - s.off; have > 0 {
		return s.need(min(n, have))
	}
	return s.need(min(n, chunkSize))
}

func (s *stream) skip(n int64) error {
	for n > 0 {
		p, err := s.some(int(min(n, chunkSize)))
		if err != nil {
			return err
		}
		n -= int64(len(p))
	}
	return nil
}

// entry is a header. Its strings are its own.
type entry struct {
	name, link string
	kind       byte
	mode       uint32
	uid, gid   int
	sec        int64
	size       int64
	dev        int
}

func padding(size int64) int64 { return -size & (block - 1) }

// next reads headers up to one that stands for a file. io.EOF is the end of the archive.
func (s *stream) next(e *entry) error {
	var name, link string
	size := int64(-1)
	for {
		h, err := s.need(block)
		if err != nil {
			return err
		}
		if h[0] == 0 {
			if _, err := io.Copy(io.Discard, s.r); err != nil {
				return err
			}
			return io.EOF
		}
		if err := e.parse(h); err != nil {
			return err
		}
		switch e.kind {
		case 'x', 'L', 'K', 'g':
			body, err := s.need(int(e.size + padding(e.size)))
			if err != nil {
				return err
			}
			body = body[:e.size]
			switch e.kind {
			case 'L':
				name = text(body)
			case 'K':
				link = text(body)
			case 'x':
				if err := pax(body, &name, &link, &size); err != nil {
					return err
				}
			}
			continue
		}
		if name != "" {
			e.name = name
		}
		if link != "" {
			e.link = link
		}
		if size >= 0 {
			e.size = size
		}
		e.name = strings.TrimSuffix(e.name, "/")
		return nil
	}
}

func (e *entry) parse(h []byte) error {
	var bad error
	number := func(p []byte) int64 {
		p = bytes.Trim(p, " \x00")
		if len(p) == 0 {
			return 0
		}
		n, err := strconv.ParseInt(string(p), 8, 64)
		if err != nil {
			bad = fmt.Errorf("number in a header: %w", err)
		}
		return n
	}
	e.name, e.link, e.kind = text(h[:100]), "", h[156]
	if e.kind == '1' || e.kind == '2' {
		e.link = text(h[157:257])
	}
	if h[345] != 0 && h[262] == 0 {
		e.name = text(h[345:500]) + "/" + e.name
	}
	e.mode, e.uid, e.gid = uint32(number(h[100:108])), int(number(h[108:116])), int(number(h[116:124]))
	e.size, e.sec = number(h[124:136]), number(h[136:148])
	if e.kind == '3' || e.kind == '4' {
		e.dev = int(number(h[329:337]))<<8 | int(number(h[337:345]))
	}
	return bad
}

func text(p []byte) string {
	if i := bytes.IndexByte(p, 0); i >= 0 {
		p = p[:i]
	}
	return string(p)
}

// pax takes what these data use of an extended header.
func pax(body []byte, name, link *string, size *int64) error {
	for len(body) > 0 {
		digits, _, ok := bytes.Cut(body, []byte{' '})
		n, err := strconv.Atoi(string(digits))
		if !ok || err != nil || n <= len(digits)+1 || n > len(body) {
			return errors.New("malformed PAX header")
		}
		key, value, _ := strings.Cut(string(body[len(digits)+1:n-1]), "=")
		switch key {
		case "path":
			*name = value
		case "linkpath":
			*link = value
		case "size":
			if *size, err = strconv.ParseInt(value, 10, 64); err != nil {
				return err
			}
		}
		body = body[n:]
	}
	return nil
}
