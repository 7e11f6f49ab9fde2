//go:build !linux

package overlaytest

import (
	"errors"
	"testing"
)

func probe(_ testing.TB, _ string) error { return errors.ErrUnsupported }
