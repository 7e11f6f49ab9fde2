//go:build !linux

package archive

import (
	"context"
	"errors"
	"io"
	"time"
)

// Layers are an affair of Linux: on other systems the package has its types, so that
// importers build there, and every call is errors.ErrUnsupported.

// Unpack is for Linux only.
func Unpack(context.Context, string, io.Reader, UnpackOptions) (Stats, error) {
	return Stats{}, errors.ErrUnsupported
}

// Pack is for Linux only.
func Pack(context.Context, string, PackOptions) (Reader, error) {
	return nil, errors.ErrUnsupported
}

// Changes is for Linux only.
func Changes(context.Context, string, ReadOptions) ([]Change, error) {
	return nil, errors.ErrUnsupported
}

// Compare is for Linux only.
func Compare(context.Context, string, string) ([]Change, error) {
	return nil, errors.ErrUnsupported
}

// CompareSince is for Linux only.
func CompareSince(context.Context, string, string, time.Time) ([]Change, error) {
	return nil, errors.ErrUnsupported
}

// Usage is for Linux only.
func Usage(context.Context, string) (Stats, error) {
	return Stats{}, errors.ErrUnsupported
}

// Files opens files of a layer. There are none but on Linux.
type Files struct{}

// OpenFiles is for Linux only.
func OpenFiles(string, ReadOptions) (*Files, error) { return nil, errors.ErrUnsupported }

// Open is for Linux only.
func (f *Files) Open(string) (io.ReadCloser, error) { return nil, errors.ErrUnsupported }

// Close does nothing.
func (f *Files) Close() error { return nil }

// OpenFile is for Linux only.
func OpenFile(string, string, ReadOptions) (io.ReadCloser, error) {
	return nil, errors.ErrUnsupported
}
