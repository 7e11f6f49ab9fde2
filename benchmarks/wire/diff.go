package wire

import (
	"errors"
	"io"
	"os"
)

// sink counts what is written to it. It is no io.ReaderFrom, so that io.Copy cannot
// go around the buffers of whoever writes.
type sink struct{ n int64 }

func (s *sink) Write(p []byte) (int, error) {
	s.n += int64(len(p))
	return len(p), nil
}

func (s *server) diff(req Request) (Response, error) {
	if req.Out != "" {
		return s.diffToFile(req)
	}
	return measure(func(res *Response) error {
		out := &sink{}
		err := s.readDiff(req, out)
		res.Bytes = out.n
		return err
	})
}

func (s *server) readDiff(req Request, out io.Writer) error {
	if req.Mode == ModePipe {
		return s.readPiped(req, out)
	}
	if dw, ok := s.sys.(DiffWriter); ok {
		return dw.WriteDiff(req.ID, req.Parent, out)
	}
	rc, err := s.sys.Diff(req.ID, req.Parent)
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(out, rc, make([]byte, 1<<20))
	return errors.Join(err, rc.Close())
}

func (s *server) readPiped(req Request, out io.Writer) error {
	if p, ok := s.sys.(Piped); ok && p.Piped() {
		rc, err := s.sys.Diff(req.ID, req.Parent)
		if err != nil {
			return err
		}
		_, err = io.CopyBuffer(out, struct{ io.Reader }{rc}, make([]byte, 32<<10))
		return errors.Join(err, rc.Close())
	}
	pr, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := s.writeInto(req, pw)
		pw.CloseWithError(err)
		done <- err
	}()
	_, err := io.CopyBuffer(out, struct{ io.Reader }{pr}, make([]byte, 32<<10))
	return errors.Join(err, <-done)
}

func (s *server) writeInto(req Request, w io.Writer) error {
	if dw, ok := s.sys.(DiffWriter); ok {
		return dw.WriteDiff(req.ID, req.Parent, w)
	}
	rc, err := s.sys.Diff(req.ID, req.Parent)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, rc)
	return errors.Join(err, rc.Close())
}

// diffToFile keeps the tar for the harness to check; its time means nothing.
func (s *server) diffToFile(req Request) (res Response, err error) {
	f, err := os.Create(req.Out)
	if err != nil {
		return res, err
	}
	err = s.readDiff(req, struct{ io.Writer }{f})
	return res, errors.Join(err, f.Close())
}
