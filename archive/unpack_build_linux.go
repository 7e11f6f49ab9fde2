package archive

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

const (
	// maxTries bounds how often something is replaced that another process puts back.
	maxTries = 3
	// atEnd is the number of what is done behind the last entry.
	atEnd = math.MaxInt64 - 1
)

// builder makes what the entries say, in their order.
type builder struct {
	*unpacker
	resolver
	names nameSet
	// lowers is the root of the merged view of the lower layers, nil for none.
	lowers *mergedDir
	// viewDirs is the number of directories that the views on the stack keep open, without the root's.
	viewDirs int
	// awaited says that opts.LowersReady has been called.
	awaited bool
	// rootOpaque says that nothing of the lower layers' root may show through.
	rootOpaque bool
	// plnk is the directory of aufs's pseudo links while there are any.
	plnk     *dirNode
	plnkName string
	// sizeSure says that the running sum is the size of the layer: it was empty, and nothing was removed.
	sizeSure bool
	cur      *outFile
	pieces   []piece
	dents    sys.DirReader
}

func newBuilder(u *unpacker, dir string) (*builder, error) {
	u.euid, u.egid = uint32(os.Geteuid()), uint32(os.Getegid())
	b := &builder{unpacker: u, names: newNameSet()}
	b.firstOpen = 1
	fd, err := sys.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	root := &dirNode{fd: fd, viewKnown: true}
	b.stack = append(b.stack, root)
	var st unix.Stat_t
	if err = sys.Fstat(fd, &st); err == nil {
		b.setNode(root, &st)
		root.acl = hasDefaultACL(fd)
		if u.opts.Format == Merged {
			u.onOverlay, err = sys.IsOverlay(fd)
		} else if b.sizeSure, err = b.empty(root); err == nil && len(u.opts.Lowers) > 0 {
			b.lowers, err = openLowers(u.opts.Lowers, u.opts.Format)
			root.view = b.lowers
		}
	}
	if err != nil {
		return nil, errors.Join(err, sys.Close(fd))
	}
	return b, nil
}

// empty says whether there is nothing in an open directory.
func (b *builder) empty(n *dirNode) (bool, error) {
	if err := b.dents.Reset(n.fd); err != nil {
		return false, err
	}
	name, _, err := b.dents.Next()
	return name == nil, err
}

// run takes items until there are no more, and ends all that is begun.
func (b *builder) run() {
	defer close(b.fill)
	for items := range b.work {
		for i := range items {
			b.item(&items[i])
		}
		b.handOver()
	}
	if b.cur != nil {
		b.cur.broken.Store(true)
		b.unref(b.cur)
	}
	if err := b.end(); err != nil && !errors.Is(err, errStopped) {
		b.fail(atEnd, fmt.Errorf("unpack: %w", err))
	}
}

// item makes one entry, and passes its body on to the fillers.
func (b *builder) item(it *item) {
	if !b.dead(it.seq) && it.entry != nil {
		var err error
		// What stopped in the midst has no error of its own: that of the other stage counts.
		if b.cur, err = b.apply(it.entry, it.seq); err != nil && !errors.Is(err, errStopped) {
			b.fail(it.seq, it.entry.failed(err))
		}
	}
	f := b.cur
	if f == nil { // the body of a mark, or of an entry that failed
		if it.chunk != nil {
			it.chunk.release()
		}
		return
	}
	if it.last {
		b.cur = nil
	} else {
		f.refs.Add(1)
	}
	b.pieces = append(b.pieces, piece{f, it.data, it.chunk, it.off})
	if len(b.pieces) == maxPieces {
		b.handOver()
	}
}

// handOver gives the pieces to a filler; if all are busy it does the work itself.
func (b *builder) handOver() {
	if len(b.pieces) == 0 {
		return
	}
	select {
	case b.fill <- b.pieces:
		b.pieces = make([]piece, 0, maxPieces)
	default:
		b.write(b.pieces)
		clear(b.pieces)
		b.pieces = b.pieces[:0]
	}
}

// end does what can be done only when all entries are there, and closes everything.
func (b *builder) end() error {
	var errs []error
	errs = append(errs, b.popTo(0))
	if b.rootOpaque && !b.dead(atEnd) {
		errs = append(errs, b.hideRoot())
	}
	errs = append(errs, b.dropPlnk(), b.popTo(0), b.leave(b.stack[0]))
	b.lowers.close()
	return errors.Join(errs...)
}

// apply makes one entry. A regular file is returned: its content is to come.
func (b *builder) apply(e *tarEntry, seq int64) (*outFile, error) {
	if first, rest := nextComponent(e.name); strings.HasPrefix(first, aufsPrefix) && first != opaqueName {
		return b.aufs(e, seq, first, rest)
	}
	dir, base := splitPath(e.name)
	if strings.HasPrefix(base, whiteoutPrefix) {
		return nil, b.mark(e, dir, base)
	}
	if e.kind == typeLink {
		return nil, b.hardLink(e, dir, base)
	}
	if err := b.walk(dir, walkMake); err != nil {
		return nil, err
	}
	if base == "" {
		if e.kind != typeDir {
			return nil, fmt.Errorf("%w: only a directory has this name", ErrBreakout)
		}
		return nil, b.setDir(b.top(), e, false)
	}
	return b.put(b.top(), base, e, seq)
}

// put makes the entry e, no hard link, by the name base in dir.
func (b *builder) put(dir *dirNode, base string, e *tarEntry, seq int64) (*outFile, error) {
	if e.kind == typeDir {
		return nil, b.directory(base, e)
	}
	m, err := b.metaOf(e, dir)
	if err != nil {
		return nil, err
	}
	switch e.kind {
	case typeReg:
		return b.file(dir, base, e, seq, m)
	case typeSymlink:
		err = b.replace(dir, base, func() error { return sys.Symlinkat(e.link, dir.fd, base) })
		b.size.Add(int64(len(e.link)))
	default:
		if e.kind == typeChar && e.major == 0 && e.minor == 0 {
			return nil, fmt.Errorf("%w: a device 0:0 would hide what is below it", ErrInvalidWhiteout)
		}
		err = b.replace(dir, base, func() error {
			return sys.Mknodat(dir.fd, base, e.fileType()|e.mode&0o777, unix.Mkdev(e.major, e.minor))
		})
		if errors.Is(err, unix.EPERM) && e.kind != typeFifo && b.inUserNamespace() {
			b.skippedDevices.Add(1)
			b.names.add(b.names.hash(dir.hash, base), nameSkipped)
			return nil, nil
		}
	}
	if err != nil {
		return nil, err
	}
	times := e.times()
	return nil, b.setNamed(dir, base, e.fileType(), &m, &times)
}

// file makes a new regular file.
func (b *builder) file(dir *dirNode, base string, e *tarEntry, seq int64, m meta) (*outFile, error) {
	f := &outFile{seq: seq, entry: e, meta: m}
	f.refs.Store(1)
	err := b.replace(dir, base, func() (err error) {
		f.fd, err = sys.Openat(dir.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, e.mode&0o777)
		return err
	})
	if err != nil {
		return nil, err
	}
	b.size.Add(e.size)
	return f, nil
}

// replace calls make, which makes the name base in dir and must say EEXIST if it is
// there; then what is there is removed first. Nothing is ever written into a file that was there.
func (b *builder) replace(dir *dirNode, base string, make func() error) error {
	b.touch(dir)
	if b.opts.Format == Merged && !dir.made {
		b.names.add(b.names.hash(dir.hash, base), nameKept)
	}
	for try := 0; ; try++ {
		err := make()
		if !errors.Is(err, unix.EEXIST) || try == maxTries {
			return err
		}
		if err := b.clear(dir, base); err != nil {
			return err
		}
	}
}

// clear removes what is there by the name base, with all beneath it.
func (b *builder) clear(dir *dirNode, base string) error {
	var st unix.Stat_t
	if err := sys.Fstatat(dir.fd, base, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	if !isWhiteoutStat(&st) {
		b.sizeSure = false
	}
	return b.removeAll(dir.fd, base)
}

// removeAll removes name beneath dirfd with all it holds, unless the work is to stop.
func (b *builder) removeAll(dirfd int, name string) error {
	return sys.RemoveAllUntil(dirfd, name, b.goOn)
}

// goOn returns an error when the work is to stop. What may take long asks it between steps.
func (b *builder) goOn() error {
	select {
	case <-b.stopped:
		return errStopped
	case <-b.ctx.Done():
		return b.ctx.Err()
	default:
		return nil
	}
}
