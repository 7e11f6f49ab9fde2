package store

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// dirPrefix begins the name of a temporary directory.
const dirPrefix = "dir-"

// TempDir is a directory below Temp. Its lock says that somebody uses it: without, a crash has left it.
type TempDir struct {
	Path string
	lock *os.File
}

// MakeTemp makes a temporary directory. Close removes it.
func (s *Store) MakeTemp() (*TempDir, error) {
	for {
		path, err := os.MkdirTemp(s.Temp(), dirPrefix)
		if err != nil {
			return nil, err
		}
		lock, err := lockDir(path)
		if err != nil {
			return nil, errors.Join(err, os.RemoveAll(path))
		}
		if lock != nil {
			return &TempDir{path, lock}, nil
		}
		// Another process took it for left, in the moment before it was locked.
	}
}

// Close removes the directory with all that is in it.
func (t *TempDir) Close() error {
	return errors.Join(os.RemoveAll(t.Path), t.lock.Close())
}

// lockDir locks a directory. It returns nil if somebody else has it locked, or removed.
func lockDir(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, ignoreAbsent(err)
	}
	ok, err := tryLock(f)
	if ok {
		var mine, there fs.FileInfo
		mine, err = f.Stat()
		if err == nil {
			there, err = os.Lstat(path)
		}
		if err == nil && os.SameFile(mine, there) {
			return f, nil
		}
	}
	return nil, errors.Join(ignoreAbsent(err), f.Close())
}

// sweepTemp removes temporary directories that nobody has locked.
func (s *Store) sweepTemp() error {
	entries, err := os.ReadDir(s.Temp())
	if err != nil {
		return err
	}
	for _, e := range entries {
		// The second is how they were called once.
		if !e.IsDir() || !strings.HasPrefix(e.Name(), dirPrefix) && !strings.HasPrefix(e.Name(), ".overlay2-export-") {
			continue
		}
		path := filepath.Join(s.Temp(), e.Name())
		lock, err := lockDir(path)
		if err != nil {
			return err
		}
		if lock == nil {
			continue
		}
		if err := (&TempDir{path, lock}).Close(); err != nil {
			return err
		}
	}
	return nil
}
