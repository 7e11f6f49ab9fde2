package overlay2

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"syscall"
)

// Sentinels, for errors.Is. What the driver returns wraps one of them, or an errno,
// in a LayerError that names the call and the layer.
var (
	// ErrNotSupported says that the kernel, the filesystem or the platform cannot do
	// what was asked for. It has the method NotSupported, which moby looks for, and is
	// errors.ErrUnsupported.
	ErrNotSupported error = notSupported{}
	// ErrIncompatibleFS says that the home lies on a filesystem overlayfs cannot use
	// as an upper layer. It is ErrNotSupported too.
	ErrIncompatibleFS error = incompatibleFS{}
	// ErrInvalidOption says that an option is unknown or has a value that cannot be.
	ErrInvalidOption = errors.New("invalid option")
	// ErrInvalidID says that a layer's ID is not one path element or is a name that the driver itself uses.
	ErrInvalidID = errors.New("invalid layer id")
	// ErrLayerNotFound says that no layer has this ID. It is fs.ErrNotExist.
	ErrLayerNotFound error = kindOf{"layer not found", fs.ErrNotExist}
	// ErrLayerExists says that a layer has this ID already. It is fs.ErrExist.
	ErrLayerExists error = kindOf{"layer exists", fs.ErrExist}
	// ErrLayerInUse says that a layer is mounted, being read, or has children.
	ErrLayerInUse = errors.New("layer is in use")
	// ErrNotMounted says that Put has nothing to give back.
	ErrNotMounted = errors.New("layer is not mounted")
	// ErrTooDeep says that a chain would have more layers than can be mounted.
	ErrTooDeep = errors.New("too many layers")
	// ErrMountTooLong says that mount(2) would cut the options: they are longer than a page less one byte.
	ErrMountTooLong = errors.New("mount options are too long")
	// ErrCorrupt says that a file of the home holds what the driver never writes.
	ErrCorrupt = errors.New("layer is corrupt")
	// ErrIncomplete says that the last ApplyDiff to a layer did not end well. Remove it or apply again.
	ErrIncomplete = errors.New("layer is incomplete")
	// ErrUnsynced says that the layer was mounted with the option volatile by a process that is no
	// more: what it holds may be what a crash left. Remove it, or accept it by ResetVolatile.
	ErrUnsynced = errors.New("layer may not have reached the disk")
	// ErrNoDigests says that Verify has nothing to compare a layer with: see RecordDigests and Options.RecordDigests.
	ErrNoDigests = errors.New("no digests are recorded")
)

// LayerError is an error of a call on one layer.
type LayerError struct {
	// Op is the call, in lower case: "create", "get", ...
	Op string
	// ID is the layer's.
	ID string
	// Err is the cause.
	Err error
}

// Error returns "op id: cause". An ID that could be mistaken for text around it is quoted.
func (e *LayerError) Error() string {
	id := e.ID
	if q := strconv.Quote(id); id == "" || len(q) != len(id)+2 {
		id = q
	}
	return e.Op + " " + id + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *LayerError) Unwrap() error { return e.Err }

// layerErr wraps err unless it is nil or names the same layer and call already.
func layerErr(op, id string, err error) error {
	if err == nil {
		return nil
	}
	if le, ok := err.(*LayerError); ok && le.ID == id && le.Op == op { //nolint:errorlint // only the outermost matters
		return err
	}
	return &LayerError{Op: op, ID: id, Err: err}
}

// corrupt returns an ErrCorrupt that says what is wrong. It is none if that is the machine's: who
// takes a layer for damaged because there are no descriptors left may throw it away.
func corrupt(format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	if exhausted(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrCorrupt, err)
}

// exhausted reports whether an error says nothing about a file but that the machine could not get at it.
func exhausted(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && slices.Contains([]syscall.Errno{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EIO, syscall.ENOSPC, syscall.EDQUOT,
	}, errno)
}

// unsupported returns an ErrNotSupported that says what is missing.
func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrNotSupported, fmt.Errorf(format, args...))
}

// kindOf is a sentinel that is also another one.
type kindOf struct {
	text string
	is   error
}

func (e kindOf) Error() string        { return e.text }
func (e kindOf) Is(target error) bool { return target == e.is }

// notSupported is the type of ErrNotSupported: moby's type switch looks for the method.
type notSupported struct{}

func (notSupported) Error() string        { return "not supported" }
func (notSupported) NotSupported()        {}
func (notSupported) Is(target error) bool { return target == errors.ErrUnsupported }

type incompatibleFS struct{}

func (incompatibleFS) Error() string { return "filesystem cannot hold overlay layers" }
func (incompatibleFS) NotSupported() {}
func (incompatibleFS) Is(target error) bool {
	return target == ErrNotSupported || target == errors.ErrUnsupported
}
