package quota_test

import (
	"errors"
	"testing"

	"github.com/bcc2decd/overlay2/quota"
)

// TestNotSupportedIsTheStandardError also checks the method that callers look for by a type switch.
func TestNotSupportedIsTheStandardError(t *testing.T) {
	if !errors.Is(quota.ErrNotSupported, errors.ErrUnsupported) {
		t.Error("ErrNotSupported is not errors.ErrUnsupported")
	}
	if _, ok := quota.ErrNotSupported.(interface{ NotSupported() }); !ok {
		t.Error("ErrNotSupported has no method NotSupported")
	}
}
