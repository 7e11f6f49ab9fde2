package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
)

const (
	// maxChunks bounds the memory for what was read and is not on disk yet.
	maxChunks = 8
	// maxBatch is the number of entries that go from one goroutine to the next at a time.
	maxBatch = 256
	// fillers is the number of goroutines that write files, beside the one that makes them.
	fillers = 2
	// progressEvery is the time between two calls of UnpackOptions.Progress.
	progressEvery = 100 * time.Millisecond
)

// errStopped ends one stage because another has failed.
var errStopped = errors.New("stopped")

// Unpack reads a tar stream to its end and makes dir, an existing directory whose path
// is trusted, hold what it says: in the formats of overlayfs as a layer over
// opts.Lowers, in Merged as an update of the tree itself. The input may be V7, USTAR, GNU
// or PAX, uncompressed. Whatever it says, nothing outside of dir is touched.
//
// After an error dir holds a part of the entries. The error is an *EntryError if it is
// about one entry, the first such in the stream's order; ErrFormat if the stream is no tar
// or is cut off; what r returned; or ctx's. ENOSPC, EDQUOT and the like are reachable by
// errors.Is. A stream that ends between two entries without the two blocks of
// zeros is whole, as it is for GNU tar.
//
// Owners, modes, times to the nanosecond, device nodes, xattrs, hard links and holes are
// those of the tar; of a time that the filesystem cannot hold the kernel makes the nearest. Xattrs of overlayfs's own are escaped, security.selinux is left
// out: the mount's label governs. In a user namespace, devices that may not be made are skipped
// and counted.
//
// Stats.Size is what Usage(dir) says, which costs a walk if dir was not empty. With Merged it is the size of what
// was written.
//
// r is read by the calling goroutine only. The other work is done by goroutines that have
// ended when Unpack returns, on threads of the process that share its umask,
// root and namespaces: a calling goroutine that is locked to a thread with others doesn't pass them on.
func Unpack(ctx context.Context, dir string, r io.Reader, opts UnpackOptions) (Stats, error) {
	if err := opts.IDMap.Validate(); err != nil {
		return Stats{}, fmt.Errorf("unpack: %w", err)
	}
	if opts.Format > Merged {
		return Stats{}, fmt.Errorf("unpack: %v: %w", opts.Format, errors.ErrUnsupported)
	}
	u := &unpacker{
		ctx:     ctx,
		opts:    opts,
		work:    make(chan []item, 2),
		fill:    make(chan []piece, fillers),
		free:    make(chan *chunk, maxChunks),
		stopped: make(chan struct{}),
	}
	u.failedAt.Store(math.MaxInt64)
	b, err := newBuilder(u, dir)
	if err != nil {
		return Stats{}, fmt.Errorf("unpack: %w", err)
	}
	return u.run(b, dir, r)
}

// unpacker is one Unpack: three stages, each ahead of the next by a bounded amount.
// The caller's goroutine reads and parses; one goroutine, the builder, does in the stream's
// order all that concerns names; the fillers give the files that it made their content and
// metadata, in no order, since they have handles and need no names.
type unpacker struct {
	ctx  context.Context
	opts UnpackOptions

	work chan []item  // from the reader to the builder
	fill chan []piece // from the builder to the fillers
	free chan *chunk  // chunks to be used again
	made int          // chunks in existence

	euid, egid uint32
	onOverlay  bool // the root is on a mounted overlay, with Merged

	// failedAt is the number of the first entry known to have failed; what follows it needs
	// not be done. err belongs to it; mu protects both for writing.
	failedAt atomic.Int64
	mu       sync.Mutex
	err      error
	// stopped is closed at the first failure.
	stopped chan struct{}

	root           bool // the stream has an entry for it. The builder's until it has ended
	size           atomic.Int64
	skippedDevices atomic.Int64
	skippedXattrs  atomic.Int64
	entries        int64
	tarBytes       int64
	lastProgress   time.Time
	batch          []item
}

// item is one entry on its way to the builder, with the first piece of its body or none;
// or, without an entry, a further piece of the body of the one before.
type item struct {
	seq   int64
	entry *tarEntry
	data  []byte
	chunk *chunk
	off   int64 // of data in the file
	last  bool  // no further piece follows
}

func (u *unpacker) run(b *builder, dir string, r io.Reader) (Stats, error) {
	var wg sync.WaitGroup
	wg.Go(func() { b.run() })
	for range fillers {
		wg.Go(u.runFiller)
	}
	t := tarReader{src: stream{ctx: u.ctx, r: r, alloc: u.alloc}}
	t.src.onRead = func() { u.progress(&t) }
	u.readAll(&t, &wg)
	u.tarBytes = t.src.off
	stats := u.stats()
	stats.Root = u.root
	err := u.err
	if err == nil && !b.sizeSure && u.opts.Format != Merged {
		var usage Stats
		if usage, err = Usage(u.ctx, dir); err == nil {
			stats.Size = usage.Size
		}
	}
	if u.opts.Progress != nil {
		u.opts.Progress(stats)
	}
	return stats, err
}

// readAll reads the stream to its end, and returns when the other stages have ended: also on the way of a panic
// of the caller's reader, from which somebody above may recover.
func (u *unpacker) readAll(t *tarReader, wg *sync.WaitGroup) {
	returned := false
	defer func() {
		if !returned {
			u.fail(-1, errStopped) // nothing more is to be done
		}
		t.src.close()
		u.flush()
		close(u.work)
		wg.Wait()
	}()
	seq, err := u.read(t)
	if err != nil && !errors.Is(err, errStopped) {
		if u.ctx.Err() != nil {
			seq = -1 // nothing more is to be done
		}
		u.fail(seq, err)
	}
	returned = true
}

// read passes the entries on to the builder. An error belongs to the entry seq.
func (u *unpacker) read(t *tarReader) (seq int64, err error) {
	for ; ; seq++ {
		e := new(tarEntry)
		if err := t.next(e); err != nil {
			if err == io.EOF {
				return seq, nil
			}
			if e.name == "" {
				return seq, fmt.Errorf("unpack: %w", err)
			}
			return seq, &EntryError{Op: "unpack", Name: e.name, Err: err}
		}
		u.entries++
		if err := u.readBody(t, seq, e); err != nil {
			return seq, &EntryError{Op: "unpack", Name: e.name, Err: err}
		}
	}
}

// readBody passes on one entry with its body, each piece with its place in the file.
func (u *unpacker) readBody(t *tarReader, seq int64, e *tarEntry) error {
	it := item{seq: seq, entry: e}
	rest := e.fragments
	var done int64 // of the body, or of the fragment rest[0]
	for {
		data, err := t.body()
		if err != nil {
			return err
		}
		if data == nil {
			it.last = true
			return u.send(it)
		}
		for len(data) > 0 {
			n := int64(len(data))
			it.off = done
			if e.sparse {
				for rest[0].length == done {
					rest, done = rest[1:], 0
				}
				n = min(n, rest[0].length-done)
				it.off = rest[0].offset + done
			}
			it.data, it.chunk, data = data[:n], t.src.cur, data[n:]
			it.last = t.left == 0 && len(data) == 0
			done += n
			t.src.cur.retain()
			if err := u.send(it); err != nil {
				return err
			}
			if it.last {
				return nil
			}
			it.entry = nil
		}
	}
}

// send adds an item to the batch, and hands the batch over when it is large.
func (u *unpacker) send(it item) error {
	u.batch = append(u.batch, it)
	if len(u.batch) < maxBatch {
		return nil
	}
	return u.flush()
}

func (u *unpacker) flush() error {
	if len(u.batch) == 0 {
		return nil
	}
	// The builder takes batches until the channel is closed, also after a failure.
	u.work <- u.batch
	u.batch = make([]item, 0, maxBatch)
	select {
	case <-u.stopped:
		return errStopped
	default:
		return nil
	}
}

// alloc returns a chunk for the stream. When all are in use it waits for one.
func (u *unpacker) alloc() (*chunk, error) {
	if err := u.flush(); err != nil {
		return nil, err
	}
	var c *chunk
	select {
	case c = <-u.free:
	default:
		if u.made < maxChunks {
			size := min(chunkSize, firstChunk<<u.made)
			u.made++
			c = &chunk{buf: make([]byte, size), free: func(c *chunk) { u.free <- c }}
			break
		}
		select {
		case c = <-u.free:
		case <-u.stopped:
			return nil, errStopped
		case <-u.ctx.Done():
			return nil, u.ctx.Err()
		}
	}
	c.refs.Store(1)
	return c, nil
}

// fail records an error with the entry seq. Of several the first in the stream's order
// is kept. What comes after it is not done any more.
func (u *unpacker) fail(seq int64, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if seq >= u.failedAt.Load() {
		return
	}
	if u.err == nil {
		close(u.stopped)
	}
	u.err = err
	u.failedAt.Store(seq)
}

// dead says that the entry seq comes after one that has failed.
func (u *unpacker) dead(seq int64) bool { return seq >= u.failedAt.Load() }

func (u *unpacker) stats() Stats {
	return Stats{
		Entries:        u.entries,
		TarBytes:       u.tarBytes,
		Size:           u.size.Load(),
		SkippedDevices: u.skippedDevices.Load(),
		SkippedXattrs:  u.skippedXattrs.Load(),
	}
}

func (u *unpacker) progress(t *tarReader) {
	if u.opts.Progress == nil {
		return
	}
	if now := time.Now(); now.Sub(u.lastProgress) >= progressEvery {
		u.lastProgress = now
		u.tarBytes = t.src.off
		u.opts.Progress(u.stats())
	}
}

// inUserNamespace is asked only after an EPERM.
func (u *unpacker) inUserNamespace() bool {
	in, err := sys.InUserNamespace()
	return err == nil && in
}
