//go:build linux

// Command cstorage is the overlay driver of containers/storage behind the harness's protocol.
package main

import (
	"io"
	"path/filepath"

	"github.com/bcc2decd/overlay2/benchmarks/wire"
	"go.podman.io/storage/drivers"
	"go.podman.io/storage/drivers/overlay"
	"go.podman.io/storage/pkg/archive"
	"go.podman.io/storage/pkg/reexec"
)

func main() {
	// The driver starts itself again as a child for deep mounts and for unpacking.
	if reexec.Init() {
		return
	}
	wire.Main(&system{})
}

type system struct {
	driver graphdriver.Driver
	home   string
}

func (s *system) Open(home string, _ bool) (err error) {
	s.home = home
	s.driver, err = overlay.Init(home, graphdriver.Options{Root: home, RunRoot: home + ".run"})
	return err
}

func (s *system) Close() error { return nil }

func (s *system) Create(id, parent string) error { return s.driver.CreateReadWrite(id, parent, nil) }

func (s *system) Apply(id, _ string, tar io.Reader) (int64, error) {
	return s.driver.ApplyDiff(id, graphdriver.ApplyDiffOpts{Diff: tar})
}

// Piped reports that Diff is the reading end of a pipe already.
func (s *system) Piped() bool { return true }

func (s *system) Diff(id, parent string) (io.ReadCloser, error) {
	return s.driver.Diff(id, nil, parent, nil, "")
}

func (s *system) DiffSize(id, parent string) (int64, error) {
	return s.driver.DiffSize(id, nil, parent, nil, "")
}

type changes []archive.Change

func (c changes) Len() int { return len(c) }

func (c changes) Line(i int) string { return c[i].String() }

func (s *system) Changes(id, parent string) (wire.Changes, error) {
	list, err := s.driver.Changes(id, nil, parent, nil, "")
	return changes(list), err
}

func (s *system) Get(id string) (string, error) { return s.driver.Get(id, graphdriver.MountOpts{}) }

func (s *system) Put(id string) error { return s.driver.Put(id) }

func (s *system) Remove(id string) error { return s.driver.Remove(id) }

func (s *system) Upper(id string) (string, error) { return filepath.Join(s.home, id, "diff"), nil }
