package archive

// ReadOptions says how Changes and OpenFile are to read a layer. The zero value reads a base
// layer that root has written.
type ReadOptions struct {
	// Format is how marks are to be read.
	Format Format
	// Lowers are the diff directories of the ancestors, nearest first.
	Lowers []string
}
