// Package wire is how the harness talks to a system under test: each system is a
// program of its own that reads one JSON request a line on its standard input and
// answers with one JSON response a line on its standard output.
//
// A process a system keeps the figures honest: its memory and its CPU seconds are
// nobody else's, two systems can link different versions of one module, and a system
// that does not build, or dies, loses only its own rows. Times are taken inside the
// process, around the call alone.
package wire

import "io"

// System is a store of layers as the harness drives it. A method that a system has no
// counterpart for returns errors.ErrUnsupported, and its row stays empty.
type System interface {
	// Open makes the store ready in home, which may not exist yet. With durable, what
	// Apply returned must survive a power cut, if the system has such a mode;
	// otherwise the harness adds a sync.
	Open(home string, durable bool) error
	// Create adds an empty layer that can be written and mounted.
	Create(id, parent string) error
	// Apply unpacks a tar into a layer.
	Apply(id, parent string, tar io.Reader) (int64, error)
	// Diff returns the layer as a tar.
	Diff(id, parent string) (io.ReadCloser, error)
	// DiffSize returns the size of a layer in bytes.
	DiffSize(id, parent string) (int64, error)
	// Changes lists what the layer changes. Making lines of it ("A /path") is not
	// part of the job and is left to the caller.
	Changes(id, parent string) (Changes, error)
	// Get mounts a layer and returns where.
	Get(id string) (string, error)
	// Put unmounts it.
	Put(id string) error
	// Remove deletes a layer.
	Remove(id string) error
	// Upper returns the directory that holds the layer's own files.
	Upper(id string) (string, error)
	// Close waits for work that goes on after calls returned.
	Close() error
}

// Changes is a list of changes in a system's own form.
type Changes interface {
	Len() int
	// Line returns change i as "A /path", "C /path" or "D /path".
	Line(i int) string
}

// Piped is implemented by a system whose Diff already returns the reading end of a
// pipe: the harness does not put another behind it.
type Piped interface{ Piped() bool }

// DiffWriter is implemented by a system that writes a diff rather than being read.
type DiffWriter interface {
	WriteDiff(id, parent string, w io.Writer) error
}

// TreeApplier is implemented by a program that copies an unpacked tree instead of
// unpacking its tar.
type TreeApplier interface {
	ApplyTree(id, tree string) error
}

// Durable is implemented by a system that has a durable mode of its own.
type Durable interface{ Durable() bool }

// Ops of a Request.
const (
	OpOpen      = "open"      // Home, Durable
	OpCreate    = "create"    // ID, Parent; with Count: ID-0 ... ID-(Count-1), each timed
	OpChain     = "chain"     // ID, Parent, Count: ID-0 on Parent, ID-1 on ID-0, ...
	OpApply     = "apply"     // ID, Parent, Tar, Tree (what the tar holds), Sync
	OpApplyMany = "applymany" // ID, Parent, Tar, Count: created and applied at once
	OpDiff      = "diff"      // ID, Parent, Mode, Out
	OpDiffSize  = "diffsize"  // ID, Parent
	OpChanges   = "changes"   // ID, Parent, Lines
	OpGet       = "get"       // ID
	OpPut       = "put"       // ID
	OpGetPut    = "getput"    // ID, Count
	OpRemove    = "remove"    // ID; with Count: ID-0 ..., each timed
	OpMixed     = "mixed"     // Parent, Workers, Count: cycles a worker
	OpUpper     = "upper"     // ID
)

// Ways to read a diff to its end.
const (
	// ModeLarge uses io.WriterTo or WriteDiff where the system has it, else reads of 1 MiB.
	ModeLarge = "large"
	// ModePipe reads in pieces of 32 KiB from an io.Pipe.
	ModePipe = "pipe"
)

// Request is one thing to do.
type Request struct {
	Op      string `json:"op"`
	Home    string `json:"home,omitempty"`
	ID      string `json:"id,omitempty"`
	Parent  string `json:"parent,omitempty"`
	Tar     string `json:"tar,omitempty"`
	Tree    string `json:"tree,omitempty"`
	Out     string `json:"out,omitempty"`
	Mode    string `json:"mode,omitempty"`
	Count   int    `json:"count,omitempty"`
	Workers int    `json:"workers,omitempty"`
	Durable bool   `json:"durable,omitempty"`
	Sync    bool   `json:"sync,omitempty"`
	Lines   bool   `json:"lines,omitempty"`
}

// Response is what came of it. Times are in nanoseconds, sizes in bytes.
type Response struct {
	Err         string `json:"err,omitempty"`
	Unsupported bool   `json:"unsupported,omitempty"`
	// Wall is the time of the call, without Sync.
	Wall int64 `json:"wall,omitempty"`
	// Sync is the time of the syncfs after it, if one was asked for and the system
	// was not durable by itself.
	Sync int64 `json:"sync,omitempty"`
	// Drain is, for remove, the time until Close returned.
	Drain int64 `json:"drain,omitempty"`
	// Samples are the single times where a request makes a call more than once.
	Samples []int64 `json:"samples,omitempty"`
	// CPU is user and system time of the process and its children.
	CPU int64 `json:"cpu,omitempty"`
	// Peak is the largest resident set of the process during the call, and of its largest child.
	Peak int64 `json:"peak,omitempty"`
	// Bytes is the size the system returned, or the length of a diff, or the number of changes.
	Bytes int64    `json:"bytes,omitempty"`
	Path  string   `json:"path,omitempty"`
	Lines []string `json:"lines,omitempty"`
}
