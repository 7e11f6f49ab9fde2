// Package split keeps what a layer's directory does not hold of the tar it came from:
// headers, padding, order, in the format of tar-split, which Docker uses for the same.
// With it the very bytes of the tar, and so its digest, can be made again.
package split

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

// Recorder passes a tar through and records its split beside the path given to Record.
type Recorder struct {
	src  io.Reader
	path string
	tmp  *os.File
	feed *io.PipeWriter
	done chan struct{} // closed when the parser is done; then whole is set
	// whole says that the parser has read the whole tar. Else the layer has no split.
	whole  bool
	failed error // the split could not be written
	off    bool  // the parser wants no more
	n      int64 // read
	end    error
}

// Record returns a reader of r that writes the split of what is read. A tar that tar-split
// cannot parse is passed through all the same; it just has no split.
func Record(r io.Reader, path string) *Recorder {
	rec := &Recorder{src: r, path: path, done: make(chan struct{})}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		rec.end = err
		return rec
	}
	rec.tmp = tmp
	pr, pw := io.Pipe()
	rec.feed = pw
	go func() {
		defer close(rec.done)
		out := &errWriter{w: tmp}
		rec.whole = parse(pr, out) == nil
		rec.failed = out.err
		// The feeder must not wait for a parser that has given up.
		pr.CloseWithError(errParser)
	}()
	return rec
}

// errWriter remembers the first error of a writer.
type errWriter struct {
	w   io.Writer
	err error
}

func (e *errWriter) Write(p []byte) (int, error) {
	n, err := e.w.Write(p)
	if e.err == nil {
		e.err = err
	}
	return n, err
}

// errParser says that the parser has gone; the feeder then goes on without.
var errParser = errors.New("tar-split has given up")

// parse writes the split of the tar r.
func parse(r io.Reader, w io.Writer) error {
	out := bufio.NewWriterSize(w, 1<<16)
	z, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err != nil {
		return err
	}
	tee, done, err := asm.NewInputTarStreamWithDone(bufio.NewReaderSize(r, 1<<17), storage.NewJSONPacker(z), nil)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, tee)
	if err = errors.Join(err, tee.Close(), <-done); err != nil {
		return err
	}
	return errors.Join(z.Close(), out.Flush())
}

// Read reads the tar.
func (r *Recorder) Read(p []byte) (int, error) {
	if r.end != nil {
		return 0, r.end
	}
	n, err := r.src.Read(p)
	r.n += int64(n)
	if n > 0 && !r.off {
		if _, werr := r.feed.Write(p[:n]); werr != nil {
			r.off = true
		}
	}
	r.end = err
	return n, err
}

// Keep puts the split in its place, if the tar can be made again from it and the files in dir, to which it was unpacked. The tar
// must have been read to its end. The caller flushes the split to the disk.
func (r *Recorder) Keep(dir string) error {
	if r.end != io.EOF {
		return fmt.Errorf("tar-split: the tar was not read to its end: %w", r.end)
	}
	if err := r.feed.Close(); err != nil {
		return err
	}
	<-r.done
	if r.failed != nil {
		return fmt.Errorf("tar-split: %w", r.failed)
	}
	if !r.whole {
		return nil
	}
	if fits, err := r.fits(dir); err != nil || !fits {
		return err
	}
	return os.Rename(r.tmp.Name(), r.path)
}

// fits reports whether the split and the files that it names make as many bytes as the tar had. They don't where an entry was
// replaced or deleted by a later one, was no file for the layer, or is sparse: whether files have changed since nobody could tell then.
func (r *Recorder) fits(dir string) (fits bool, err error) {
	if _, err := r.tmp.Seek(0, io.SeekStart); err != nil {
		return false, err
	}
	z, err := gzip.NewReader(bufio.NewReader(r.tmp))
	if err != nil {
		return false, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, z.Close(), root.Close()) }()
	n, seen := int64(0), map[[2]uint64]bool{} // a name may lead through a symlink to a file of another name
	for entries := storage.NewJSONUnpacker(z); ; {
		e, err := entries.Next()
		if err == io.EOF {
			return n == r.n, nil
		}
		if err != nil {
			return false, err
		}
		if e.Type == storage.SegmentType {
			n += int64(len(e.Payload))
			continue
		}
		if e.Size == 0 {
			continue
		}
		n += e.Size
		name := clean(e.GetName())
		st, err := root.Lstat(name)
		if err != nil || !st.Mode().IsRegular() || st.Size() != e.Size {
			return false, nil
		}
		id, ok := inodeOf(st)
		if !ok || seen[id] {
			return false, nil
		}
		seen[id] = true
	}
}

// Close ends the recording. What Keep has not kept is removed.
func (r *Recorder) Close() error {
	if r.tmp == nil {
		return nil
	}
	r.feed.CloseWithError(io.ErrUnexpectedEOF)
	<-r.done
	err := os.Remove(r.tmp.Name())
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	err = errors.Join(err, r.tmp.Close())
	r.tmp = nil
	return err
}

// Replay returns the tar whose split lies at path and whose files lie in the directory
// dir. No split is os.ErrNotExist. A file that is not as it was, or not there, is an error of Read.
func Replay(path, dir string) (io.ReadCloser, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	z, err := gzip.NewReader(bufio.NewReader(f))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	pr, pw := io.Pipe()
	p := &replay{PipeReader: pr, done: make(chan struct{}), closers: []io.Closer{z, f, root}}
	go func() {
		defer close(p.done)
		pw.CloseWithError(asm.WriteOutputTarStream(files{root}, storage.NewJSONUnpacker(z), pw))
	}()
	return p, nil
}

type replay struct {
	*io.PipeReader
	done    chan struct{}
	closers []io.Closer
}

// Close waits for the writer, which uses what is closed here.
func (r *replay) Close() error {
	errs := []error{r.PipeReader.Close()}
	<-r.done
	for _, c := range r.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// files gives tar-split the bodies. os.Root keeps every name within the layer.
type files struct{ root *os.Root }

func (f files) Get(name string) (io.ReadCloser, error) {
	file, err := f.root.OpenFile(clean(name), os.O_RDONLY|nonblock, 0)
	if err != nil {
		return nil, err
	}
	st, err := file.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%q is no regular file", name)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// clean returns where in a layer an entry of a tar lies.
func clean(name string) string { return filepath.Clean(strings.TrimLeft(name, "/")) }
