package archive

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/bcc2decd/overlay2/internal/sys"
)

// nameList holds the names of one directory in one piece of memory. Of a very large directory it holds the first
// names in bytewise order, and reads on when these are used up: memory has a bound, and each
// part costs one more listing.
type nameList struct {
	bytes []byte
	names []listedName
	next  int

	// rest says that the directory has more names, all behind last.
	rest bool
	last []byte
	// total is the number of names that the listing found, those that are not held yet among them.
	total int
	// most is half of how many names are held at most, maxNames if it is 0.
	most int
}

type listedName struct {
	// prefix is the name's first eight bytes, so that sorting seldom looks further.
	prefix uint64
	start  uint32
	length uint16
	typ    uint8
}

const (
	// stopEvery is the number of names after which a long list is left if the work is to stop.
	stopEvery = 1 << 12
	// maxNames is how many names of a directory are held if it has more than twice as many. These are
	// some 6 MiB, twice that for a moment, and a million names take eight listings, of a quarter of a second each.
	maxNames = 1 << 17
)

// reset makes the list that of an empty directory.
func (l *nameList) reset() {
	l.bytes, l.names, l.next = l.bytes[:0], l.names[:0], 0
	l.rest, l.last, l.total = false, l.last[:0], 0
}

// read lists the directory fd, which was not listed before. It ends with an error of stop. A list with a rest is
// sorted in any case.
func (l *nameList) read(r *sys.DirReader, fd int, sorted bool, stop func() error) error {
	l.reset()
	r.Start(fd)
	return l.fill(r, sorted, stop)
}

// readOn lists the next names of the directory fd, in place of those that were listed before.
func (l *nameList) readOn(r *sys.DirReader, fd int, stop func() error) error {
	last := l.last
	l.last = nil
	l.reset()
	l.last = last
	if err := r.Reset(fd); err != nil {
		return err
	}
	return l.fill(r, true, stop)
}

// fill takes the smallest of those names that come behind last.
func (l *nameList) fill(r *sys.DirReader, sorted bool, stop func() error) error {
	most := l.most
	if most == 0 {
		most = maxNames
	}
	var spare []byte // for the names that stay
	for {
		name, typ, err := r.Next()
		if err != nil {
			return err
		}
		if name == nil {
			break
		}
		if l.total++; l.total%stopEvery == 0 {
			if err := stop(); err != nil {
				return err
			}
		}
		if len(l.last) > 0 && bytes.Compare(name, l.last) <= 0 {
			continue
		}
		if l.rest && bytes.Compare(name, l.greatest(most)) >= 0 {
			continue
		}
		l.add(name, typ)
		if len(l.names) == 2*most {
			if spare, err = l.halve(most, spare, stop); err != nil {
				return err
			}
		}
	}
	if sorted || l.rest {
		if err := l.sort(stop); err != nil {
			return err
		}
	}
	if l.rest {
		end := l.at(l.names[len(l.names)-1])
		l.last = append(l.last[:0], end[:len(end)-1]...)
	}
	return nil
}

// greatest is what halve left as the last name: those behind it are for another listing.
func (l *nameList) greatest(most int) []byte {
	name := l.at(l.names[most-1])
	return name[:len(name)-1]
}

// halve keeps the first names in bytewise order. It moves them to other, and returns the memory where they were.
func (l *nameList) halve(most int, other []byte, stop func() error) ([]byte, error) {
	if err := l.sort(stop); err != nil {
		return nil, err
	}
	l.rest = true
	l.names = l.names[:most]
	other = other[:0]
	for i, n := range l.names {
		name := l.at(n)
		l.names[i].start = uint32(len(other))
		other = append(other, name...)
	}
	l.bytes, other = other, l.bytes
	return other, nil
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

// take returns the next name; nil is the end of what is listed.
func (l *nameList) take() (sys.Name, uint8) {
	if l.next == len(l.names) {
		return nil, 0
	}
	n := l.names[l.next]
	l.next++
	return l.at(n), n.typ
}

// peek returns the next name without taking it.
func (l *nameList) peek() sys.Name {
	if l.next == len(l.names) {
		return nil
	}
	return l.at(l.names[l.next])
}
