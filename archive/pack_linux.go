package archive

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// Pack returns the tree at dir, a trusted host path, as a tar stream that is made while
// it is read. Nothing is written and no goroutine runs.
//
// The same tree gives the same bytes: entries are sorted bytewise within each directory,
// names have no leading "./" or "/", directories end in "/", and only what USTAR
// cannot say is in PAX records (nanoseconds, long names, large numbers, xattrs as
// SCHILY.xattr, GNU.sparse 1.0). The root has an entry, "./", only if its mode, owner or
// xattrs are not what it would have anyway: those of the lowers' root or, without lowers,
// 0755 0:0. A root's own time and its opaque mark, which overlayfs ignores, are not kept.
//
// Marks of the overlay formats become ".wh.NAME" (mode 0, owner 0:0, time 0) and
// ".wh..wh..opq". With Lowers known, those are left out where no lower directory merges, and
// so nothing is to be hidden. Xattrs are those of PackOptions.Xattrs, with ACLs also as SCHILY.acl;
// others but overlayfs's own are counted. Further names of a file have only its security.capability, as in Docker's tars.
// Sockets are left out and counted.
//
// No device is ever opened, nor a fifo waited for, whatever another process puts into the tree meanwhile.
// What is mounted beneath dir is packed too, but with the overlay formats, for which overlayfs sees no such mounts, not if it is
// unbindable (mount_namespaces(7)).
//
// A renamed directory (redirect_dir) is packed with all that it shows: a file in it that was a
// link of one elsewhere in a lower layer becomes a file of its own.
//
// Errors of the stream are *EntryError: over ErrChanged if the tree changes meanwhile in a way
// that the archive cannot hold, over ErrInvalidWhiteout for a file, there or deleted,
// whose name could be taken for a mark, over ErrUnmapped for an owner outside the id map, over ENAMETOOLONG and
// E2BIG for what Unpack would refuse: paths of more than 64 KiB, and of one file more than 4,096 xattrs or 1 MiB of them. A stream that failed
// never ends in io.EOF.
func Pack(ctx context.Context, dir string, opts PackOptions) (Reader, error) {
	p := &packer{ctx: ctx, opts: opts, links: make(map[inode]link), noDevices: -1}
	p.body.fd = -1
	p.walk.stop = p.goOn
	p.attrs.choice = opts.Xattrs
	if err := p.open(dir); err != nil {
		p.release()
		return nil, &EntryError{Op: "pack", Name: "./", Err: err}
	}
	return p, nil
}

// packer is an archive in the making. What Read delivers next is, in this order: out, the
// body of the file at hand, its padding; then the next entry is begun.
type packer struct {
	ctx   context.Context
	opts  PackOptions
	attrs xattrNames

	closing atomic.Bool
	mu      sync.Mutex // Read and Close may come from two goroutines; protects all below
	// err is what every further Read returns.
	err error
	// walk and frames are the directories that it is in.
	walk   walk
	frames []packFrame
	// noDevices is the mount that the walk is in, on which no device can be opened, whoever puts it there; -1 for none.
	noDevices int
	// lowers is the root of the view of opts.Lowers, nil without.
	lowers *mergedDir
	// picked are the names to pack in each directory, by its path with a trailing slash; nil means all.
	picked map[string]*nameList
	// path names the directory at hand with a trailing slash, empty for the root; entry the
	// entry at hand.
	path, entry []byte

	out    []byte // formatted headers
	outPos int
	body   packBody
	done   bool // the end of the archive is in out

	links    map[inode]link
	header   headerWriter
	xattrBuf []byte
	xattrs   []tarXattr
	target   []byte
	small    []byte // what Read in small pieces has left
	smallBuf []byte
	stats    Stats
	reported time.Time
}

// link is a file with several names of which one was written.
type link struct {
	name string
	// capability is what the entries of the other names need, too: Docker and containerd change the owner of what such
	// an entry leads to, which clears security.capability and no other xattr, and then set the entry's xattrs.
	capability string
	left       uint32 // names still to come
}

// open opens dir and the lowers, and begins with the root.
func (p *packer) open(dir string) error {
	if err := p.opts.IDMap.Validate(); err != nil {
		return err
	}
	fd, err := sys.OpenRoot(dir)
	if err != nil {
		return err
	}
	lowers := p.opts.Lowers
	if p.opts.Format == Merged {
		lowers = lowers[:min(1, len(lowers))]
		var fsInfo unix.Statfs_t
		if err := unix.Fstatfs(fd, &fsInfo); err != nil {
			_ = sys.Close(fd)
			return err
		}
		p.attrs.raw = fsInfo.Type == unix.OVERLAYFS_SUPER_MAGIC
	}
	fd = p.forbidDevices(fd)
	if len(lowers) > 0 {
		if p.lowers, err = openLowers(lowers, p.opts.Format); err != nil {
			_ = sys.Close(fd)
			return err
		}
	}
	if p.opts.Format == Merged && p.opts.Changes != nil {
		if p.picked, err = pickNames(p.opts.Changes); err != nil {
			_ = sys.Close(fd)
			return err
		}
	}
	p.entry = append(p.entry, "./"...)
	m, err := p.root(fd)
	if err != nil {
		_ = sys.Close(fd)
		return err
	}
	p.frames = append(p.frames, packFrame{low: p.lowers, lowKnown: true, marks: m})
	return p.enter(fd)
}

// forbidDevices returns the root fd or, in its place, the same directory on a mount of our own without devices. Where that
// is not to be had, files are opened in a slower way. So they are where something may be mounted beneath a tree that
// is no layer's: an unbindable mount would not be seen, others would stay in use though somebody unmounts them. Overlayfs
// itself sees nothing that is mounted beneath a layer's directory.
func (p *packer) forbidDevices(fd int) int {
	if p.opts.Format == Merged {
		if has, err := sys.HasMounts(fd); err != nil || has {
			return fd
		}
	}
	tree, err := sys.CloneNoDevices(fd)
	if err != nil {
		return fd
	}
	root, err := sys.OpenDirat(tree, ".")
	if err != nil {
		_ = sys.Close(tree)
		return fd
	}
	_ = sys.Close(fd) // read only: nothing can be lost
	p.noDevices = tree
	return root
}

// Read fills b with as much of the archive as fits. Pieces of 64 KiB and more are
// filled in place.
func (p *packer) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	const inPlace = 64 << 10
	if len(b) == 0 {
		return 0, nil
	}
	if len(p.small) == 0 {
		if len(b) >= inPlace {
			return p.fill(b)
		}
		if p.smallBuf == nil {
			p.smallBuf = make([]byte, 2*inPlace)
		}
		n, err := p.fill(p.smallBuf)
		if n == 0 {
			return 0, err
		}
		p.small = p.smallBuf[:n]
	}
	n := copy(b, p.small)
	p.small = p.small[n:]
	return n, nil
}

// WriteTo writes the rest of the archive to w in large pieces.
func (p *packer) WriteTo(w io.Writer) (int64, error) {
	buf := make([]byte, 1<<20)
	var total int64
	for {
		p.mu.Lock()
		n := copy(buf, p.small)
		p.small = p.small[n:]
		var readErr error
		if n == 0 {
			n, readErr = p.fill(buf)
		}
		p.mu.Unlock()
		if n > 0 {
			written, err := w.Write(buf[:n])
			total += int64(written)
			if err == nil && written < n {
				err = io.ErrShortWrite
			}
			if err != nil {
				p.mu.Lock()
				p.fail(err)
				p.err = err // what w did not take is lost, even if it was the last
				p.mu.Unlock()
				return total, err
			}
		}
		if readErr == io.EOF {
			return total, nil
		}
		if readErr != nil {
			return total, readErr
		}
	}
}

// Stats returns the counts so far.
func (p *packer) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stats
}

// Close releases what is open. Reading on is fs.ErrClosed.
func (p *packer) Close() error {
	p.closing.Store(true) // for a Read that holds mu
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil || p.err == io.EOF {
		p.err = fs.ErrClosed
	}
	p.small = nil
	p.release()
	return nil
}

// goOn returns an error when the work is to stop.
func (p *packer) goOn() error {
	if p.closing.Load() {
		return fs.ErrClosed
	}
	return p.ctx.Err()
}

func (p *packer) release() {
	p.body.close()
	p.walk.close()
	for i := range p.frames {
		if i > 0 {
			p.frames[i].low.close()
		}
		p.frames[i].view.close()
	}
	p.frames = nil
	p.lowers.close()
	if p.noDevices >= 0 {
		_ = sys.Close(p.noDevices) // a mount that is in no table goes with its descriptor
		p.noDevices = -1
	}
	p.links = nil
}

// fail ends the stream with err; the first one stays.
func (p *packer) fail(err error) {
	if p.err == nil {
		p.err = err
		p.release()
	}
}

// fill makes the stream into b until that is full or the stream ends.
func (p *packer) fill(b []byte) (n int, err error) {
	for n < len(b) && p.err == nil {
		var m int
		switch {
		case p.outPos < len(p.out):
			m = copy(b[n:], p.out[p.outPos:])
			p.outPos += m
		case p.body.left > 0:
			m, err = p.body.read(b[n:])
		case p.body.pad > 0:
			m = copy(b[n:], zeros[:p.body.pad])
			p.body.pad -= m
		case p.done:
			err = io.EOF
		default:
			p.out, p.outPos = p.out[:0], 0
			err = p.next()
		}
		n += m
		p.stats.TarBytes += int64(m)
		p.report(err == io.EOF)
		if err == io.EOF {
			p.fail(io.EOF)
		} else if err != nil {
			p.fail(&EntryError{Op: "pack", Name: string(p.entry), Err: err})
		}
	}
	if n > 0 {
		return n, nil // the error, if any, is the next call's
	}
	return 0, p.err
}

// report calls Progress if it is time to.
func (p *packer) report(last bool) {
	if p.opts.Progress == nil {
		return
	}
	if now := time.Now(); last || now.Sub(p.reported) >= 100*time.Millisecond {
		p.reported = now
		p.opts.Progress(p.stats)
	}
}

// pickNames sorts the changes into the directories that they are in.
func pickNames(changes []Change) (map[string]*nameList, error) {
	kinds := make(map[string]map[string]uint8)
	for _, c := range changes {
		if c.Path == "/" {
			continue // the root has no name in a directory
		}
		parts := strings.Split(strings.TrimPrefix(c.Path, "/"), "/")
		dir := ""
		for i, name := range parts {
			if name == "" || name == "." || name == ".." || strings.IndexByte(name, 0) >= 0 {
				return nil, fmt.Errorf("change %q is no path: %w", c.Path, unix.EINVAL)
			}
			if kinds[dir] == nil {
				kinds[dir] = make(map[string]uint8)
			}
			switch {
			case i < len(parts)-1:
				if _, known := kinds[dir][name]; !known {
					kinds[dir][name] = pickThrough
				}
			case c.Kind == Deleted:
				kinds[dir][name] = pickDeleted
			default:
				kinds[dir][name] = unix.DT_UNKNOWN
			}
			dir += name + "/"
		}
	}
	picked := map[string]*nameList{"": {}}
	for dir, names := range kinds {
		list := new(nameList)
		for name, typ := range names {
			list.add([]byte(name), typ)
		}
		if err := list.sort(func() error { return nil }); err != nil {
			return nil, err
		}
		picked[dir] = list
	}
	return picked, nil
}

// Types of a picked name beside those of getdents.
const (
	// pickDeleted: it becomes a whiteout.
	pickDeleted = 0x80 + iota
	// pickThrough: a directory without an entry of its own, but with some beneath.
	pickThrough
)
