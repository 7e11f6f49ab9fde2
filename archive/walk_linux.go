package archive

import (
	"errors"
	"fmt"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// walkDir is a directory that a walk is in.
type walkDir struct {
	nameList
	// fd is -1 while the directory is parked.
	fd       int
	parked   bool
	dev, ino uint64
}

// maxOpen is the number of directories that a walk keeps open: nesting goes deeper
// than descriptors do.
const maxOpen = 64

// walk is the way from the root of a tree to where a walk is. Those far up are parked:
// closed, and opened again through ".." on the way back.
type walk struct {
	dirs  []*walkDir
	spare []*walkDir
	dents sys.DirReader
	// stop says whether the work is to stop, by an error; nil is never.
	stop func() error
}

// top returns the directory that the walk is in, nil at its end.
func (w *walk) top() *walkDir {
	if len(w.dirs) == 0 {
		return nil
	}
	return w.dirs[len(w.dirs)-1]
}

// push goes down into fd, which is the walk's from then on, and lists it.
func (w *walk) push(fd int, sorted bool) error {
	d, err := w.enter(fd)
	if err != nil {
		return err
	}
	return w.list(d, fd, sorted)
}

// list reads the names of a directory that the walk is in.
func (w *walk) list(d *walkDir, fd int, sorted bool) error {
	return d.read(&w.dents, fd, sorted, w.stopper())
}

// more lists further names of d, the directory at hand, if it has some and those listed are used up. It comes before
// take or peek.
func (w *walk) more(d *walkDir) error {
	if !d.rest || d.next < len(d.names) {
		return nil
	}
	return d.readOn(&w.dents, d.fd, w.stopper())
}

func (w *walk) stopper() func() error {
	if w.stop == nil {
		return func() error { return nil }
	}
	return w.stop
}

// enter goes down into fd, which is the walk's from then on. The caller adds the names. An
// fd of -1 is a directory that has no handle of its own; it is never parked.
func (w *walk) enter(fd int) (*walkDir, error) {
	var d *walkDir
	if n := len(w.spare); n > 0 {
		d, w.spare = w.spare[n-1], w.spare[:n-1]
	} else {
		d = new(walkDir)
	}
	d.fd, d.parked = fd, false
	d.reset()
	w.dirs = append(w.dirs, d)
	// The way back is through the directory below: it must have a handle.
	if up := len(w.dirs) - 1 - maxOpen; up >= 0 && w.dirs[up].fd >= 0 && w.dirs[up+1].fd >= 0 {
		return d, w.dirs[up].park()
	}
	return d, nil
}

func (d *walkDir) park() error {
	var st sys.Stat
	if err := sys.StatFd(d.fd, &st); err != nil {
		return err
	}
	d.dev, d.ino = st.Dev, st.Ino
	err := sys.Close(d.fd)
	d.fd, d.parked = -1, true
	return err
}

// pop goes up again. That the directory above is no longer the one that the walk came
// through is ErrChanged.
func (w *walk) pop() error {
	d := w.top()
	w.dirs = w.dirs[:len(w.dirs)-1]
	var err error
	if up := w.top(); up != nil && up.parked {
		err = up.unpark(d.fd)
	}
	if d.fd >= 0 {
		_ = sys.Close(d.fd) // read only: nothing can be lost
	}
	d.fd = -1
	if cap(d.bytes) <= 1<<16 {
		w.spare = append(w.spare, d)
	}
	return err
}

func (d *walkDir) unpark(below int) error {
	fd, err := sys.OpenDirat(below, "..")
	if errors.Is(err, unix.ENOENT) { // out of the mount that the walk is in
		return fmt.Errorf("directory was moved: %w: %w", ErrChanged, err)
	}
	if err != nil {
		return err
	}
	var st sys.Stat
	err = sys.StatFd(fd, &st)
	if err == nil && (st.Dev != d.dev || st.Ino != d.ino) {
		err = fmt.Errorf("directory was moved: %w", ErrChanged)
	}
	if err != nil {
		_ = sys.Close(fd)
		return err
	}
	d.fd, d.parked = fd, false
	return nil
}

// close closes what is open.
func (w *walk) close() {
	for _, d := range w.dirs {
		if d.fd >= 0 {
			_ = sys.Close(d.fd) // read only: nothing can be lost
			d.fd = -1
		}
	}
	w.dirs = nil
}
