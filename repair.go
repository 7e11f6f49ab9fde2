package overlay2

import "fmt"

// RepairOpts say what Repair may do.
type RepairOpts struct {
	// DryRun only lists what would be done.
	DryRun bool
	// RemoveOrphans deletes layers that nothing can use: no link leads to them, they don't say which
	// is theirs, and they never had a child. Docker leaves such when it is killed in Create or Remove. It deletes no
	// directory with anything in it that is no layer's, and is an error where no layer at all has a link.
	RemoveOrphans bool
}

// Action is one step of Repair. Each is atomic: done as a whole or not at all.
type Action struct {
	// ID is the layer's, "" if none is concerned.
	ID string
	// Path is the file's, relative to the home.
	Path string
	// What is done: "write ...", "make a link to ...", "remove", "set mode ...".
	What string
	// Why says what is wrong, and for what is not plain how the right thing is known.
	Why string
	// Err is why it was not done, nil if it was or if that was not asked for.
	Err error
}

// String returns "path: what (why)", and the error if there is one.
func (a Action) String() string {
	s := fmt.Sprintf("%s: %s (%s)", a.Path, a.What, a.Why)
	if a.Err != nil {
		s += ": " + a.Err.Error()
	}
	return s
}
