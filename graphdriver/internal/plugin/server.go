//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/archive"
)

// request holds the fields of all calls but Init.
type request struct {
	ID, Parent, MountLabel string
	StorageOpt             map[string]string
}

// response holds the fields of all answers. The daemon takes an Err that is not empty for the call's error.
type response struct {
	Err          string            `json:",omitempty"`
	Dir          string            `json:",omitempty"`
	Exists       bool              `json:",omitempty"`
	Status       [][2]string       `json:",omitempty"`
	Changes      []archive.Change  `json:",omitempty"`
	Size         int64             `json:",omitempty"`
	Metadata     map[string]string `json:",omitempty"`
	Capabilities struct{}          // none: ReproducesExactDiffs would do without tar-split
}

type idMap struct {
	ContainerID uint32 `json:"container_id"`
	HostID      uint32 `json:"host_id"`
	Size        uint32 `json:"size"`
}

// initRequest is what the daemon says once, when it starts.
type initRequest struct {
	Home             string
	Opts             []string
	UIDMaps, GIDMaps []idMap
}

var errNoInit = errors.New("the daemon has not called GraphDriver.Init")

// server answers the daemon's calls. The daemon says Init only when it starts itself, so the server keeps what it said
// in a file, by which a server that takes over from a dead one goes on.
type server struct {
	state string

	mu     sync.Mutex
	driver *overlay2.Driver // nil before Init
}

// newServer makes a server that keeps its state in a file, and opens the home that an earlier one had open.
func newServer(state string) (*server, error) {
	s := &server{state: state}
	b, err := os.ReadFile(state)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	s.driver, err = openHome(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", state, err)
	}
	return s, nil
}

// openHome opens the home that the body of an Init names.
func openHome(body []byte) (*overlay2.Driver, error) {
	var r initRequest
	if err := json.Unmarshal(body, &r); err != nil {
		return nil, err
	}
	if r.Home == "" {
		return nil, errors.New("no Home in it")
	}
	return overlay2.Init(r.Home, r.Opts, archive.IDMap{UIDs: ranges(r.UIDMaps), GIDs: ranges(r.GIDMaps)})
}

func ranges(maps []idMap) (r []archive.IDRange) {
	for _, m := range maps {
		r = append(r, archive.IDRange(m))
	}
	return r
}

// init opens the home that the daemon names. A daemon that was killed says Init again: what it had mounted then belongs
// to nobody, and the new Driver adopts it.
func (s *server) init(body []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.driver != nil {
		if err := s.driver.Cleanup(); err != nil {
			return err
		}
		s.driver = nil
	}
	d, err := openHome(body)
	if err != nil {
		return err
	}
	s.driver = d
	tmp := s.state + ".new"
	if err := os.WriteFile(tmp, body, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, s.state)
}

func (s *server) opened() (*overlay2.Driver, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.driver == nil {
		return nil, errNoInit
	}
	return s.driver, nil
}

// calls are those that take a request and answer with a response.
var calls = map[string]func(*overlay2.Driver, request, *response) error{
	"Create": func(d *overlay2.Driver, r request, _ *response) error {
		return d.Create(r.ID, r.Parent, &overlay2.CreateOpts{MountLabel: r.MountLabel, StorageOpt: r.StorageOpt})
	},
	"CreateReadWrite": func(d *overlay2.Driver, r request, _ *response) error {
		return d.CreateReadWrite(r.ID, r.Parent, &overlay2.CreateOpts{MountLabel: r.MountLabel, StorageOpt: r.StorageOpt})
	},
	"Remove": func(d *overlay2.Driver, r request, _ *response) error { return d.Remove(r.ID) },
	"Get": func(d *overlay2.Driver, r request, a *response) (err error) {
		a.Dir, err = d.Get(r.ID, r.MountLabel)
		return err
	},
	"Put": func(d *overlay2.Driver, r request, _ *response) error { return d.Put(r.ID) },
	"Exists": func(d *overlay2.Driver, r request, a *response) error {
		a.Exists = d.Exists(r.ID)
		return nil
	},
	"Status": func(d *overlay2.Driver, _ request, a *response) error {
		a.Status = d.Status()
		return nil
	},
	"GetMetadata": func(d *overlay2.Driver, r request, a *response) (err error) {
		a.Metadata, err = d.GetMetadata(r.ID)
		return err
	},
	"Changes": func(d *overlay2.Driver, r request, a *response) (err error) {
		a.Changes, err = d.Changes(r.ID, r.Parent)
		return err
	},
	"DiffSize": func(d *overlay2.Driver, r request, a *response) (err error) {
		a.Size, err = d.DiffSize(r.ID, r.Parent)
		return err
	},
	"Cleanup": func(d *overlay2.Driver, _ request, _ *response) error { return d.Cleanup() },
}

// handler is the server's HTTP side.
func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /Plugin.Activate", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, struct{ Implements []string }{[]string{"GraphDriver"}})
	})
	mux.HandleFunc("POST /GraphDriver.Init", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err == nil {
			err = s.init(body)
		}
		answerErr(w, response{}, err)
	})
	mux.HandleFunc("POST /GraphDriver.Capabilities", func(w http.ResponseWriter, _ *http.Request) { answer(w, response{}) })
	mux.HandleFunc("POST /GraphDriver.Diff", s.diff)
	mux.HandleFunc("POST /GraphDriver.ApplyDiff", func(w http.ResponseWriter, r *http.Request) {
		var a response
		d, err := s.opened()
		if err == nil {
			a.Size, err = d.ApplyDiff(r.URL.Query().Get("id"), r.URL.Query().Get("parent"), r.Body)
		}
		answerErr(w, a, err)
	})
	for name, call := range calls {
		mux.HandleFunc("POST /GraphDriver."+name, func(w http.ResponseWriter, r *http.Request) {
			var a response
			d, q, err := s.request(r)
			if err == nil {
				err = call(d, q, &a)
			}
			answerErr(w, a, err)
		})
	}
	return mux
}

func (s *server) request(r *http.Request) (d *overlay2.Driver, q request, err error) {
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		return nil, q, fmt.Errorf("%s: %w", r.URL.Path, err)
	}
	d, err = s.opened()
	return d, q, err
}

// diff sends a layer's tar. An error after its first bytes can only be told by breaking off: the daemon must not
// take a tar for whole that is not.
func (s *server) diff(w http.ResponseWriter, r *http.Request) {
	d, q, err := s.request(r)
	var tar io.ReadCloser
	if err == nil {
		tar, err = d.Diff(q.ID, q.Parent)
	}
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		answer(w, response{Err: err.Error()})
		return
	}
	_, err = io.Copy(w, tar)
	if err = errors.Join(err, tar.Close()); err != nil {
		panic(http.ErrAbortHandler)
	}
}

func answerErr(w http.ResponseWriter, a response, err error) {
	if err != nil {
		a = response{Err: err.Error()}
	}
	answer(w, a)
}

func answer(w http.ResponseWriter, a any) {
	var b bytes.Buffer
	if err := json.NewEncoder(&b).Encode(a); err != nil {
		panic(err) // a value that cannot be JSON: a bug
	}
	w.Header().Set("Content-Type", "application/vnd.docker.plugins.v1.2+json")
	_, _ = w.Write(b.Bytes()) // who asked is gone
}
