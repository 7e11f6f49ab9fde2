package archive

// ChangesOptions says how Changes is to read a layer. The zero value reads a base layer
// that root has written: everything in it is Added.
type ChangesOptions struct {
	// Format is how marks are to be read. Merged is an error: use Compare.
	Format Format
	// Lowers are the diff directories of the ancestors, nearest first.
	Lowers []string
}
