package archive

import (
	"errors"
	"sync/atomic"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// maxPieces is the number of pieces that a filler gets at a time. Their files are open.
const maxPieces = 32

// outFile is a new regular file, from its creation until it is complete.
type outFile struct {
	fd    int
	seq   int64
	entry *tarEntry
	meta  meta
	// refs counts the pieces to be written, and the builder while there may be more.
	refs atomic.Int32
	// broken says that the content is not complete and the file not to be finished.
	broken atomic.Bool
}

// piece is a part of a file's content; without data it only ends the file.
type piece struct {
	file  *outFile
	data  []byte
	chunk *chunk
	off   int64
}

func (u *unpacker) runFiller() {
	for pieces := range u.fill {
		u.write(pieces)
	}
}

// write writes pieces of files, and finishes those of which they were the last.
func (u *unpacker) write(pieces []piece) {
	for _, p := range pieces {
		f := p.file
		switch {
		case u.dead(f.seq):
			f.broken.Store(true)
		case len(p.data) > 0 && !f.broken.Load():
			if err := sys.PwriteFull(f.fd, p.data, p.off); err != nil {
				f.broken.Store(true)
				u.fail(f.seq, f.entry.failed(err))
			}
		}
		if p.chunk != nil {
			p.chunk.release()
		}
		u.unref(f)
	}
}

// unref drops a reference to f; the last one finishes and closes the file.
func (u *unpacker) unref(f *outFile) {
	if f.refs.Add(-1) > 0 {
		return
	}
	var err error
	if !f.broken.Load() {
		err = u.finish(f)
	}
	if err = errors.Join(err, sys.Close(f.fd)); err != nil {
		u.fail(f.seq, f.entry.failed(err))
	}
}

// finish gives a file whose content is written its length and metadata.
func (u *unpacker) finish(f *outFile) error {
	e := f.entry
	if e.sparse && !e.endsInData() {
		if err := sys.Ftruncate(f.fd, e.size); err != nil {
			return err
		}
	}
	// Creating gave it the process's owner or the directory's group, and a mode cut by the
	// umask: cheaper to look than to set both always.
	var st unix.Stat_t
	if err := sys.Fstat(f.fd, &st); err != nil {
		return err
	}
	if err := f.meta.setOpen(f.fd, &st); err != nil {
		return err
	}
	times := e.times()
	return sys.Futimens(f.fd, &times)
}

// endsInData says that writing the fragments gives the sparse file its length.
func (e *tarEntry) endsInData() bool {
	if len(e.fragments) == 0 {
		return e.size == 0
	}
	last := e.fragments[len(e.fragments)-1]
	return last.length > 0 && last.offset+last.length == e.size
}

// times returns atime, left alone unless the tar has one, and mtime.
func (e *tarEntry) times() [2]unix.Timespec {
	times := [2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, sys.Timespec(e.mtime.sec, e.mtime.nsec)}
	if e.hasAtime {
		times[0] = sys.Timespec(e.atime.sec, e.atime.nsec)
	}
	return times
}

// failed makes an error one of this entry.
func (e *tarEntry) failed(err error) error {
	return &EntryError{Op: "unpack", Name: e.name, Err: err}
}
