//go:build !linux

package quota

// Control manages the quotas of directories; only Linux has it.
type Control struct{}

// Open returns ErrNotSupported.
func Open(string) (*Control, error) { return nil, ErrNotSupported }

// Set returns ErrNotSupported.
func (*Control) Set(string, Limits) error { return ErrNotSupported }

// Get returns ErrNotSupported.
func (*Control) Get(string) (Limits, Usage, error) { return Limits{}, Usage{}, ErrNotSupported }

// Resize returns ErrNotSupported.
func (*Control) Resize(string, Limits) error { return ErrNotSupported }

// Clear returns ErrNotSupported.
func (*Control) Clear(string) error { return ErrNotSupported }
