package archive

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// nameList holds the names of one directory in one piece of memory.
type nameList struct {
	bytes []byte
	names []listedName
	next  int
}

type listedName struct {
	// prefix is the name's first eight bytes, so that sorting seldom looks further.
	prefix uint64
	start  uint32
	length uint16
	typ    uint8
}

// stopEvery is the number of names after which a long list is left if the work is to stop.
const stopEvery = 1 << 12

// read lists the directory fd, which was not listed before. It ends with an error of stop.
func (l *nameList) read(r *sys.DirReader, fd int, sorted bool, stop func() error) error {
	l.bytes, l.names, l.next = l.bytes[:0], l.names[:0], 0
	r.Start(fd)
	for {
		if len(l.names)%stopEvery == stopEvery-1 {
			if err := stop(); err != nil {
				return err
			}
		}
		name, typ, err := r.Next()
		if err != nil {
			return err
		}
		if name == nil {
			break
		}
		if int64(len(l.bytes)+len(name)) >= 1<<32-1 {
			return fmt.Errorf("directory with more than 4 GiB of names: %w", unix.E2BIG)
		}
		l.add(name, typ)
	}
	if sorted {
		return l.sort(stop)
	}
	return nil
}

func (l *nameList) add(name []byte, typ uint8) {
	var key [8]byte
	copy(key[:], name)
	l.names = append(l.names, listedName{
		prefix: binary.BigEndian.Uint64(key[:]),
		start:  uint32(len(l.bytes)), length: uint16(len(name)), typ: typ,
	})
	l.bytes = append(append(l.bytes, name...), 0)
}

// sort orders the names bytewise. It ends with an error of stop, in no order then.
func (l *nameList) sort(stop func() error) error {
	var compared int
	var err error
	slices.SortFunc(l.names, func(a, b listedName) int {
		if compared++; compared%(16*stopEvery) == 0 && err == nil {
			err = stop()
		}
		if err != nil {
			return 0 // names that are all the same are soon in order
		}
		if a.prefix != b.prefix {
			return cmp.Compare(a.prefix, b.prefix)
		}
		return bytes.Compare(l.at(a), l.at(b))
	})
	return err
}

func (l *nameList) at(n listedName) sys.Name {
	return l.bytes[n.start : n.start+uint32(n.length)+1]
}

// take returns the next name; nil is the end.
func (l *nameList) take() (sys.Name, uint8) {
	if l.next == len(l.names) {
		return nil, 0
	}
	n := l.names[l.next]
	l.next++
	return l.at(n), n.typ
}

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
	stop := w.stop
	if stop == nil {
		stop = func() error { return nil }
	}
	return d.read(&w.dents, fd, sorted, stop)
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
	d.bytes, d.names, d.next = d.bytes[:0], d.names[:0], 0
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
