package overlay2

import "fmt"

// Problem is something in a home that is not as docs/format.md says.
type Problem struct {
	// ID is the layer's, "" if none is concerned.
	ID string
	// Path is the file's, relative to the home.
	Path string
	// Err says what is wrong: ErrCorrupt, ErrIncomplete, ErrUnsynced or another error.
	Err error
}

// String returns "path: what is wrong".
func (p Problem) String() string { return fmt.Sprintf("%s: %v", p.Path, p.Err) }
