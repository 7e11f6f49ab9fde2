package wire

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"time"
)

// Serve answers requests on r until its end. It is the whole of a worker's main.
func Serve(s System, r io.Reader, w io.Writer) error {
	in := json.NewDecoder(bufio.NewReader(r))
	out := bufio.NewWriter(w)
	srv := &server{sys: s}
	for {
		var req Request
		if err := in.Decode(&req); err == io.EOF {
			return s.Close()
		} else if err != nil {
			return err
		}
		res, err := srv.do(req)
		if err != nil {
			res.Err = err.Error()
			res.Unsupported = errors.Is(err, errors.ErrUnsupported)
		}
		if err := json.NewEncoder(out).Encode(res); err != nil {
			return err
		}
		if err := out.Flush(); err != nil {
			return err
		}
	}
}

// Main serves on the standard streams and leaves the process. What a library prints
// to the standard output must not end up in the protocol, so it goes to the error stream.
func Main(s System) {
	protocol := os.Stdout
	os.Stdout = os.Stderr
	if err := Serve(s, os.Stdin, protocol); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

type server struct {
	sys  System
	home string
}

func (s *server) do(req Request) (Response, error) {
	switch req.Op {
	case OpOpen:
		s.home = req.Home
		return measure(func(*Response) error { return s.sys.Open(req.Home, req.Durable) })
	case OpCreate:
		return s.each(req, func(id string) error { return s.sys.Create(id, req.Parent) })
	case OpChain:
		return Response{}, s.chain(req)
	case OpApply:
		return s.apply(req)
	case OpApplyMany:
		return s.applyMany(req)
	case OpDiff:
		return s.diff(req)
	case OpDiffSize:
		return measure(func(res *Response) (err error) {
			res.Bytes, err = s.sys.DiffSize(req.ID, req.Parent)
			return err
		})
	case OpChanges:
		return s.changes(req)
	case OpGet:
		return measure(func(res *Response) (err error) {
			res.Path, err = s.sys.Get(req.ID)
			return err
		})
	case OpPut:
		return measure(func(*Response) error { return s.sys.Put(req.ID) })
	case OpGetPut:
		return s.getPut(req)
	case OpRemove:
		return s.remove(req)
	case OpMixed:
		return s.mixed(req)
	case OpUpper:
		path, err := s.sys.Upper(req.ID)
		return Response{Path: path}, err
	}
	return Response{}, fmt.Errorf("unknown request %q", req.Op)
}

// measure runs f with nothing left over from before it in the heap.
func measure(f func(*Response) error) (Response, error) {
	var res Response
	debug.FreeOSMemory()
	u, err := startUsage()
	if err != nil {
		return res, err
	}
	start := time.Now()
	ferr := f(&res)
	res.Wall = int64(time.Since(start))
	if err := u.stop(&res); err != nil {
		return res, errors.Join(ferr, err)
	}
	return res, ferr
}

// each calls f for ID, or for Count ids beginning with it, and keeps each call's time.
func (s *server) each(req Request, f func(id string) error) (Response, error) {
	if req.Count == 0 {
		return measure(func(*Response) error { return f(req.ID) })
	}
	return measure(func(res *Response) error {
		res.Samples = make([]int64, 0, req.Count)
		for i := range req.Count {
			id := req.ID + "-" + strconv.Itoa(i)
			start := time.Now()
			if err := f(id); err != nil {
				return err
			}
			res.Samples = append(res.Samples, int64(time.Since(start)))
		}
		return nil
	})
}

func (s *server) chain(req Request) error {
	parent := req.Parent
	for i := range req.Count {
		id := req.ID + "-" + strconv.Itoa(i)
		if err := s.sys.Create(id, parent); err != nil {
			return err
		}
		parent = id
	}
	return nil
}

func (s *server) apply(req Request) (_ Response, err error) {
	f, err := os.Open(req.Tar)
	if err != nil {
		return Response{}, err
	}
	defer f.Close()
	res, err := measure(func(res *Response) (err error) {
		if t, ok := s.sys.(TreeApplier); ok {
			return t.ApplyTree(req.ID, req.Tree)
		}
		// A struct around the file hides its other methods: every system gets a plain
		// reader, as from a network.
		res.Bytes, err = s.sys.Apply(req.ID, req.Parent, struct{ io.Reader }{f})
		return err
	})
	if d, ok := s.sys.(Durable); err == nil && req.Sync && !(ok && d.Durable()) {
		start := time.Now()
		err = syncfs(s.home)
		res.Sync = int64(time.Since(start))
	}
	return res, err
}

func (s *server) applyMany(req Request) (Response, error) {
	return measure(func(res *Response) error {
		return together(req.Count, func(i int) error {
			f, err := os.Open(req.Tar)
			if err != nil {
				return err
			}
			defer f.Close()
			id := req.ID + "-" + strconv.Itoa(i)
			if err := s.sys.Create(id, req.Parent); err != nil {
				return err
			}
			_, err = s.sys.Apply(id, req.Parent, struct{ io.Reader }{f})
			return err
		})
	})
}

func (s *server) mixed(req Request) (Response, error) {
	return measure(func(res *Response) error {
		return together(req.Workers, func(w int) error {
			for i := range req.Count {
				id := fmt.Sprintf("mixed-%d-%d", w, i)
				if err := s.sys.Create(id, req.Parent); err != nil {
					return err
				}
				if _, err := s.sys.Get(id); err != nil {
					return err
				}
				if err := s.sys.Put(id); err != nil {
					return err
				}
				if err := s.sys.Remove(id); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// together runs f(0) ... f(n-1) at once and returns all their errors.
func together(n int, f func(int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (s *server) changes(req Request) (Response, error) {
	var list Changes
	res, err := measure(func(*Response) (err error) {
		list, err = s.sys.Changes(req.ID, req.Parent)
		return err
	})
	if err != nil {
		return res, err
	}
	res.Bytes = int64(list.Len())
	if req.Lines {
		for i := range list.Len() {
			res.Lines = append(res.Lines, list.Line(i))
		}
	}
	return res, nil
}

func (s *server) getPut(req Request) (Response, error) {
	return measure(func(res *Response) error {
		res.Samples = make([]int64, 0, req.Count)
		for range req.Count {
			start := time.Now()
			if _, err := s.sys.Get(req.ID); err != nil {
				return err
			}
			if err := s.sys.Put(req.ID); err != nil {
				return err
			}
			res.Samples = append(res.Samples, int64(time.Since(start)))
		}
		return nil
	})
}

func (s *server) remove(req Request) (Response, error) {
	start := time.Now()
	res, err := s.each(req, s.sys.Remove)
	if err == nil {
		err = s.sys.Close()
	}
	res.Drain = int64(time.Since(start))
	return res, err
}
