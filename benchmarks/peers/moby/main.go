//go:build linux

// Command moby is Docker's overlay2 driver behind the harness's protocol.
package main

import (
	"errors"
	"io"
	"path/filepath"

	"github.com/bcc2decd/overlay2/benchmarks/wire"
	"github.com/moby/go-archive"
	"github.com/moby/moby/v2/daemon/graphdriver"
	"github.com/moby/moby/v2/daemon/graphdriver/overlay2"
	"github.com/moby/sys/user"
)

func main() { wire.Main(&system{}) }

type system struct {
	driver graphdriver.Driver
	home   string
}

func (s *system) Open(home string, _ bool) (err error) {
	s.home = home
	s.driver, err = overlay2.Init(home, nil, user.IdentityMapping{})
	return err
}

func (s *system) Close() error { return nil }

func (s *system) Create(id, parent string) error { return s.driver.CreateReadWrite(id, parent, nil) }

func (s *system) Apply(id, parent string, tar io.Reader) (int64, error) {
	return s.driver.ApplyDiff(id, parent, tar)
}

// Piped reports that Diff is the reading end of a pipe already.
func (s *system) Piped() bool { return true }

func (s *system) Diff(id, parent string) (io.ReadCloser, error) { return s.driver.Diff(id, parent) }

func (s *system) DiffSize(id, parent string) (int64, error) { return s.driver.DiffSize(id, parent) }

type changes []archive.Change

func (c changes) Len() int { return len(c) }

func (c changes) Line(i int) string { return c[i].String() }

func (s *system) Changes(id, parent string) (wire.Changes, error) {
	list, err := s.driver.Changes(id, parent)
	return changes(list), err
}

func (s *system) Get(id string) (string, error) { return s.driver.Get(id, "") }

func (s *system) Put(id string) error { return s.driver.Put(id) }

func (s *system) Remove(id string) error { return s.driver.Remove(id) }

func (s *system) Upper(id string) (string, error) {
	meta, err := s.driver.GetMetadata(id)
	if err == nil && meta["UpperDir"] == "" {
		// A layer without a parent has no UpperDir there.
		return filepath.Join(s.home, id, "diff"), nil
	}
	if err != nil {
		return "", errors.Join(errors.New("metadata"), err)
	}
	return meta["UpperDir"], nil
}
