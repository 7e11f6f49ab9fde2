package archive

import (
	"errors"
	"strconv"
)

var (
	// ErrBreakout says that an entry would have been written, or read, outside the root.
	ErrBreakout = errors.New("name leads out of the root")
	// ErrInvalidWhiteout says that a name or a node could be taken for a mark and is none:
	// ".wh.", a device 0:0 in a tar, a file named ".wh.x" in a tree.
	ErrInvalidWhiteout = errors.New("invalid whiteout")
	// ErrFormat says that the stream is not a tar, is cut off, or holds a header that
	// cannot be true. It wraps the detail.
	ErrFormat = errors.New("malformed tar")
	// ErrUnmapped says that an owner has no counterpart in the id map.
	ErrUnmapped = errors.New("owner is not covered by the id map")
	// ErrChanged says that a tree was changed while it was read.
	ErrChanged = errors.New("changed while it was read")
)

// EntryError is an error with one entry of an archive or one file of a tree.
type EntryError struct {
	// Op is what was being done: "unpack", "pack", "changes", ...
	Op string
	// Name is the entry's name as the archive or the tree has it, relative to the root.
	Name string
	// Err is the cause; an errno is reachable by errors.Is.
	Err error
}

// Error returns `op "name": cause`.
func (e *EntryError) Error() string { return e.Op + " " + strconv.Quote(e.Name) + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *EntryError) Unwrap() error { return e.Err }
