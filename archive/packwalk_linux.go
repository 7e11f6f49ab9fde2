package archive

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// packFrame is what Pack knows of a directory that it is in, beside its walkDir.
type packFrame struct {
	// start is where the directory's own name begins in packer.path.
	start int
	marks marks
	// low is what the lowers have beneath it, nil if nothing; known says that it was
	// looked up. That is done only when something in the directory depends on it.
	low      *mergedDir
	lowKnown bool
	// view, if set, is where names are looked up: a renamed directory (redirect_dir) is packed
	// with all that it shows, its own and the lowers' part.
	view *mergedDir
}

// next begins the next entry, or goes up a directory.
func (p *packer) next() error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	d := p.walk.top()
	if d == nil {
		p.done = true
		p.out = append(p.out, zeros[:2*blockSize]...)
		return nil
	}
	if err := p.walk.more(d); err != nil {
		return err
	}
	name, typ := d.take()
	if name == nil {
		return p.leave()
	}
	p.entry = append(append(p.entry[:0], p.path...), name[:len(name)-1]...)
	if bytes.HasPrefix(name, []byte(whiteoutPrefix)) {
		return fmt.Errorf("a file has the name of a mark: %w", ErrInvalidWhiteout)
	}
	if typ == pickDeleted {
		return p.whiteout(name)
	}
	f := &p.frames[len(p.frames)-1]
	src := source{dirfd: d.fd, name: name}
	through := typ == pickThrough
	if f.view != nil {
		e, err := f.view.lookup(name.String())
		if err == nil && !e.exists {
			err = ErrChanged
		}
		if err != nil {
			return err
		}
		src.dirfd, typ = e.dirfd, uint8(e.st.Mode>>12)
	} else if typ == unix.DT_UNKNOWN || through {
		var st sys.Stat
		if err := sys.StatName(d.fd, name, &st); err != nil {
			return err
		}
		typ = uint8(st.Mode >> 12) // as IFTODT does
		if through && typ != unix.DT_DIR {
			return ErrChanged
		}
	}
	switch typ {
	case unix.DT_DIR:
		return p.dir(src, f, through)
	case unix.DT_REG:
		return p.file(src, f)
	}
	return p.node(src, f)
}

// source is where an entry lies.
type source struct {
	dirfd int
	name  sys.Name
}

// enter goes down into fd, which is the walk's from then on, and whose frame is the last.
func (p *packer) enter(fd int) error {
	f := &p.frames[len(p.frames)-1]
	p.forgetLow(len(p.frames) - 1 - maxOpen)
	d, err := p.walk.enter(fd)
	if err != nil {
		return err
	}
	switch {
	case f.view != nil:
		names, err := f.view.names()
		for _, name := range names {
			d.add([]byte(name), unix.DT_UNKNOWN)
		}
		return err
	case p.picked != nil:
		if list := p.picked[string(p.path)]; list != nil {
			d.nameList = *list
		}
		return nil
	}
	return p.walk.list(d, fd, true)
}

// leave goes up from the directory at hand.
func (p *packer) leave() error {
	last := len(p.frames) - 1
	f := p.frames[last]
	p.entry = append(p.entry[:0], p.path...)
	err := p.walk.pop()
	if last > 0 {
		f.low.close()
	}
	f.view.close()
	p.path = p.path[:f.start]
	p.frames = p.frames[:last]
	return err
}

// low returns what the lowers have beneath the directory at hand, nil if nothing.
func (p *packer) low() (*mergedDir, error) {
	top := len(p.frames) - 1
	from := top
	for !p.frames[from].lowKnown {
		from--
	}
	for i := from + 1; i <= top; i++ {
		f := &p.frames[i]
		if up := p.frames[i-1].low; up != nil {
			end := len(p.path)
			if i < top {
				end = p.frames[i+1].start
			}
			var err error
			if f.low, err = up.below(f.marks, string(p.path[f.start:end-1])); err != nil {
				return nil, err
			}
		}
		f.lowKnown = true
		if i-1 > from && i-1 <= top-maxOpen {
			p.forgetLow(i - 1)
		}
	}
	return p.frames[top].low, nil
}

// forgetLow closes what low found of a frame far up, but not of the root, from which it is found
// again.
func (p *packer) forgetLow(i int) {
	if i <= 0 {
		return
	}
	f := &p.frames[i]
	f.low.close()
	f.low, f.lowKnown = nil, false
}

// whiteout writes the deletion of name, unless it is known to hide nothing.
func (p *packer) whiteout(name sys.Name) error {
	if p.lowers != nil && p.opts.Format != Merged && !p.opts.AllMarks {
		low, err := p.low()
		if err != nil || low == nil {
			return err
		}
	}
	return p.mark(whiteoutPrefix + name.String())
}

// mark writes an entry in the directory at hand that says something of the lowers.
func (p *packer) mark(name string) error {
	p.entry = append(append(p.entry[:0], p.path...), name...)
	return p.put(&packHeader{name: p.entry, typ: typeReg})
}

// dir writes the entry of a directory, unless it is only on the way to others, and goes down
// into it.
func (p *packer) dir(src source, f *packFrame, through bool) error {
	p.entry = append(p.entry, '/')
	frame := packFrame{start: len(p.path)}
	var err error
	fd := -1
	if f.view != nil {
		if frame.view, err = f.view.child(src.name.String()); err != nil {
			return err
		}
		if frame.view == nil {
			return ErrChanged
		}
	} else {
		fd, err = sys.OpenQuiet(src.dirfd, src.name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return replaced(err)
		}
	}
	if !through {
		from := fd
		if frame.view != nil {
			from = frame.view.parts[0].fd
		}
		frame.marks, err = p.dirEntry(from)
	}
	if err == nil && frame.marks.redirect != "" && frame.view == nil {
		frame.view, err = p.redirected(fd, src.name, frame.marks)
	}
	opaque := false
	if err == nil && f.view == nil && (frame.marks.opaque || frame.marks.redirect != "") {
		opaque, err = p.hides(src.name)
	}
	if err == nil {
		p.path = append(append(p.path, src.name[:len(src.name)-1]...), '/')
		if opaque {
			err = p.mark(opaqueName)
		}
	}
	if err != nil {
		frame.view.close()
		if fd >= 0 {
			_ = sys.Close(fd)
		}
		return err
	}
	p.frames = append(p.frames, frame)
	return p.enter(fd)
}

// hides says whether an opaque directory of that name has something to hide, as far as that is
// known: the kernel marks most new directories, where nothing lies beneath.
func (p *packer) hides(name sys.Name) (bool, error) {
	if p.lowers == nil || p.opts.AllMarks {
		return true, nil
	}
	low, err := p.low()
	if err != nil || low == nil {
		return false, err
	}
	e, err := low.lookup(name.String())
	return e.exists && e.st.Mode&unix.S_IFMT == unix.S_IFDIR, err
}

// redirected returns all that the renamed directory fd shows.
func (p *packer) redirected(fd int, name sys.Name, m marks) (*mergedDir, error) {
	if p.lowers == nil {
		return nil, errNeedsLowers("overlay.redirect")
	}
	low, err := p.low()
	if err != nil {
		return nil, err
	}
	return p.lowers.shown(low, fd, name.String(), m)
}

// replaced says that something else was found than was listed.
func replaced(err error) error {
	if errors.Is(err, sys.ErrNotRegular) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("%w: %w", ErrChanged, err)
	}
	return err
}
