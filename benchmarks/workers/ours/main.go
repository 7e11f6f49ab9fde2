//go:build linux

// Command ours is this library behind the harness's protocol.
package main

import (
	"errors"
	"io"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/benchmarks/wire"
)

func main() { wire.Main(&system{}) }

type system struct {
	driver *overlay2.Driver
	strict bool
}

// Open takes the defaults; a durable store is one in the strict mode.
func (s *system) Open(home string, durable bool) (err error) {
	var opts overlay2.Options
	if s.strict = durable; durable {
		opts.Durability = overlay2.DurabilityStrict
	}
	s.driver, err = overlay2.New(home, opts)
	return err
}

// Durable reports that what returned is on the disk: no sync is to be added.
func (s *system) Durable() bool { return s.strict }

// Close waits for the deletions that Remove leaves to the background.
func (s *system) Close() error {
	if s.driver == nil {
		return nil
	}
	return s.driver.Cleanup()
}

func (s *system) Create(id, parent string) error { return s.driver.CreateReadWrite(id, parent, nil) }

func (s *system) Apply(id, parent string, tar io.Reader) (int64, error) {
	return s.driver.ApplyDiff(id, parent, tar)
}

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
		err = errors.New("no UpperDir in the metadata")
	}
	return meta["UpperDir"], err
}
