//go:build !linux

package store

import (
	"errors"
	"os"
)

func tryLock(*os.File) (bool, error) { return false, errors.ErrUnsupported }

// Sync is of Linux.
func (s *Store) Sync() error { return errors.ErrUnsupported }
