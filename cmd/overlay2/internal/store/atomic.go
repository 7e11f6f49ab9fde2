package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// tempPrefix begins the name of a file that is being written.
const tempPrefix = ".new-"

// write makes path hold v as JSON, or stay as it was: a temporary file is written, flushed
// to the disk if it is to last, and renamed.
func (s *Store) write(path string, v any, last bool) (err error) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), tempPrefix)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ignoreAbsent(os.Remove(f.Name())))
		}
	}()
	_, err = f.Write(append(b, '\n'))
	if err == nil && last {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil || !last {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func (s *Store) remove(path string) error {
	if err := os.Remove(path); err != nil {
		return ignoreAbsent(err)
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Lock waits until no other process changes the set of layers and images, and makes the
// store if it is not there. waiting is called once if there is something to wait for.
// Close the result to unlock.
func (s *Store) Lock(ctx context.Context, waiting func()) (io.Closer, error) {
	if err := s.Init(); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(s.root, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for first := true; ; first = false {
		ok, err := tryLock(f)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		}
		if ok {
			break
		}
		if first && waiting != nil {
			waiting()
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), f.Close())
		case <-time.After(50 * time.Millisecond):
		}
	}
	if err := s.sweep(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// sweep removes half-written files and temporary directories that a crash left. The caller has the lock.
func (s *Store) sweep() error {
	for _, dir := range []string{imageDir, layerDir} {
		entries, err := os.ReadDir(filepath.Join(s.root, dir))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), tempPrefix) {
				if err := ignoreAbsent(os.Remove(filepath.Join(s.root, dir, e.Name()))); err != nil {
					return err
				}
			}
		}
	}
	return s.sweepTemp()
}
