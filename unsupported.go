//go:build !linux

package overlay2

import (
	"context"
	"io"
	"os"

	"github.com/bcc2decd/overlay2/archive"
)

// Driver keeps the layers of one home directory. It is for Linux; elsewhere New says so.
type Driver struct{}

// New returns ErrNotSupported: overlayfs is Linux's.
func New(string, Options) (*Driver, error) { return nil, ErrNotSupported }

// Init returns ErrNotSupported, or what is wrong with the options.
func Init(_ string, options []string, _ archive.IDMap) (*Driver, error) {
	if _, err := ParseOptions(options); err != nil {
		return nil, err
	}
	return nil, ErrNotSupported
}

// String returns "overlay2".
func (d *Driver) String() string { return "overlay2" }

// Create returns ErrNotSupported.
func (d *Driver) Create(id, _ string, _ *CreateOpts) error {
	return layerErr("create", id, ErrNotSupported)
}

// CreateReadWrite returns ErrNotSupported.
func (d *Driver) CreateReadWrite(id, _ string, opts *CreateOpts) error {
	if _, err := parseStorageOpt(opts, limits{}); err != nil {
		return layerErr("create", id, err)
	}
	return layerErr("create", id, ErrNotSupported)
}

// Remove returns ErrNotSupported.
func (d *Driver) Remove(id string) error { return layerErr("remove", id, ErrNotSupported) }

// Exists returns false.
func (d *Driver) Exists(string) bool { return false }

// Get returns ErrNotSupported.
func (d *Driver) Get(id, mountLabel string) (string, error) {
	if err := checkMountLabel(mountLabel); err != nil {
		return "", layerErr("get", id, err)
	}
	return "", layerErr("get", id, ErrNotSupported)
}

// GetWith returns ErrNotSupported.
func (d *Driver) GetWith(id string, opts MountOpts) (string, error) { return d.Get(id, opts.Label) }

// Put returns ErrNotSupported.
func (d *Driver) Put(id string) error { return layerErr("put", id, ErrNotSupported) }

// Mount returns ErrNotSupported.
func (d *Driver) Mount(id string, _ MountOpts) (*Mount, error) {
	return nil, layerErr("mount", id, ErrNotSupported)
}

// ResetVolatile returns ErrNotSupported.
func (d *Driver) ResetVolatile(id string) error { return layerErr("reset", id, ErrNotSupported) }

// MountData returns ErrNotSupported.
func (d *Driver) MountData(id, _ string) (MountData, error) {
	return MountData{}, layerErr("mount data", id, ErrNotSupported)
}

// Mount is a read-only view of a layer. There are none but on Linux.
type Mount struct{}

// FD returns -1.
func (m *Mount) FD() int { return -1 }

// Path returns "".
func (m *Mount) Path() string { return "" }

// File returns ErrNotSupported.
func (m *Mount) File() (*os.File, error) { return nil, ErrNotSupported }

// Attach returns ErrNotSupported.
func (m *Mount) Attach(string) error { return ErrNotSupported }

// Close does nothing.
func (m *Mount) Close() error { return nil }

// ApplyDiff returns ErrNotSupported.
func (d *Driver) ApplyDiff(id, _ string, _ io.Reader) (int64, error) {
	return 0, layerErr("apply", id, ErrNotSupported)
}

// ApplyLayers returns ErrNotSupported.
func (d *Driver) ApplyLayers(string, []LayerDiff) ([]int64, error) { return nil, ErrNotSupported }

// Diff returns ErrNotSupported.
func (d *Driver) Diff(id, _ string) (io.ReadCloser, error) {
	return nil, layerErr("diff", id, ErrNotSupported)
}

// Files opens files of a layer. There are none but on Linux.
type Files struct{}

// Files returns ErrNotSupported.
func (d *Driver) Files(id string) (*Files, error) { return nil, layerErr("files", id, ErrNotSupported) }

// Open returns ErrNotSupported.
func (f *Files) Open(string) (io.ReadCloser, error) { return nil, ErrNotSupported }

// Close does nothing.
func (f *Files) Close() error { return nil }

// DiffSize returns ErrNotSupported.
func (d *Driver) DiffSize(id, _ string) (int64, error) {
	return 0, layerErr("size", id, ErrNotSupported)
}

// Usage returns ErrNotSupported.
func (d *Driver) Usage(id string) (Usage, error) {
	return Usage{}, layerErr("usage", id, ErrNotSupported)
}

// Resize returns ErrNotSupported, or what is wrong with the options.
func (d *Driver) Resize(id string, storageOpt map[string]string) error {
	if err := checkResize(storageOpt); err != nil {
		return layerErr("resize", id, err)
	}
	return layerErr("resize", id, ErrNotSupported)
}

// Rebase returns ErrNotSupported.
func (d *Driver) Rebase(id, _ string) error { return layerErr("rebase", id, ErrNotSupported) }

// Changes returns ErrNotSupported.
func (d *Driver) Changes(id, _ string) ([]archive.Change, error) {
	return nil, layerErr("changes", id, ErrNotSupported)
}

// Status returns nothing.
func (d *Driver) Status() [][2]string { return nil }

// GetMetadata returns ErrNotSupported.
func (d *Driver) GetMetadata(id string) (map[string]string, error) {
	return nil, layerErr("metadata", id, ErrNotSupported)
}

// Cleanup does nothing.
func (d *Driver) Cleanup() error { return nil }

// Sync returns ErrNotSupported.
func (d *Driver) Sync() error { return ErrNotSupported }

// Check returns ErrNotSupported.
func (d *Driver) Check() ([]Problem, error) { return nil, ErrNotSupported }

// CheckHome returns ErrNotSupported.
func CheckHome(string) ([]Problem, error) { return nil, ErrNotSupported }

// PlanRepair returns ErrNotSupported.
func PlanRepair(string, RepairOpts) ([]Action, error) { return nil, ErrNotSupported }

// Repair returns ErrNotSupported.
func (d *Driver) Repair(RepairOpts) ([]Action, error) { return nil, ErrNotSupported }

// RecordDigests returns ErrNotSupported.
func (d *Driver) RecordDigests(_ context.Context, id string) error {
	return layerErr("record digests", id, ErrNotSupported)
}

// Verify returns ErrNotSupported.
func (d *Driver) Verify(_ context.Context, id string, _ func(Difference)) error {
	return layerErr("verify", id, ErrNotSupported)
}
