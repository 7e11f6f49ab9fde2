package archive

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// chain is what all directories of one merged view share.
type chain struct {
	format Format
	// roots are the layers' root directories, nearest first.
	roots []lowerDir
	dents sys.DirReader
}

// lowerDir is a directory of one layer.
type lowerDir struct {
	fd int
	// layer is its layer's place in the chain, 0 is the nearest.
	layer int
	// marked says that empty regular files with the xattr overlay.whiteout are
	// whiteouts here: the directory has overlay.opaque=x (Linux 6.8, commit 420332b94119).
	marked bool
}

// mergedDir is one directory of what overlayfs would show of a chain of layers: the
// directories that merge here, nearest first. The one that openLowers returned must
// be closed last: the others find renamed directories by it. Not for concurrent use.
type mergedDir struct {
	chain *chain
	parts []lowerDir
	// index finds the first part that has a name; see partsFor.
	index map[string]int
	asked int
}

// lowerEntry is what a merged directory has by one name.
type lowerEntry struct {
	exists bool
	// st is the metadata; of a directory, that of the nearest layer that has it, as
	// overlayfs shows it.
	st unix.Stat_t
	// dirfd is the directory in which name lies; it is the mergedDir's.
	dirfd int
}

// openLowers opens the root of the merged view of the layers whose root directories
// are paths, nearest first. None at all gives a directory that is empty.
//
// An opaque mark on a layer's root is ignored, as overlayfs does.
func openLowers(paths []string, f Format) (*mergedDir, error) {
	c := &chain{format: f}
	d := &mergedDir{chain: c}
	for i, path := range paths {
		fd, err := sys.OpenRoot(path)
		if err != nil {
			d.close()
			return nil, fmt.Errorf("open layer %s: %w", path, err)
		}
		part := lowerDir{fd: fd, layer: i}
		d.parts = append(d.parts, part)
		marks, err := readMarks(fd, f)
		if err != nil {
			d.close()
			return nil, fmt.Errorf("open layer %s: %w", path, err)
		}
		d.parts[i].marked = marks.holdsMarks
	}
	c.roots = slices.Clone(d.parts)
	return d, nil
}

// close closes the directories. It is fine on nil.
func (d *mergedDir) close() {
	if d == nil {
		return
	}
	for _, p := range d.parts {
		_ = sys.Close(p.fd) // read only: nothing can be lost
	}
	d.parts = nil
}

// lookup returns what the directory shows by name.
func (d *mergedDir) lookup(name string) (lowerEntry, error) {
	var e lowerEntry
	for _, p := range d.partsFor(name) {
		err := sys.Fstatat(p.fd, name, &e.st)
		if isNotThere(err) {
			continue
		}
		if err != nil {
			return lowerEntry{}, err
		}
		white, err := p.isWhiteout(name, &e.st, d.chain.format)
		if err != nil || white {
			return lowerEntry{}, err
		}
		e.exists, e.dirfd = true, p.fd
		return e, nil
	}
	return lowerEntry{}, nil
}

// isNotThere says that a layer doesn't have a name: also one that its filesystem
// finds too long, as in overlayfs.
func isNotThere(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENAMETOOLONG)
}

// isWhiteout says whether name, which st describes, is a whiteout in p.
func (p lowerDir) isWhiteout(name string, st *unix.Stat_t, f Format) (bool, error) {
	if f == Merged {
		return false, nil
	}
	if st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 {
		return true, nil
	}
	if !p.marked || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != 0 {
		return false, nil
	}
	_, err := sys.Getxattrat(p.fd, name, f.xattrPrefix()+"whiteout")
	if noXattr(err) {
		return false, nil
	}
	return err == nil, err
}

// child returns the merged directory of that name, nil if name is none here.
func (d *mergedDir) child(name string) (*mergedDir, error) {
	return d.descend(&search{format: d.chain.format, name: name})
}

// below returns what merges beneath a directory that lies by name in the layer above all of
// d: nil if nothing does. m are that directory's marks.
func (d *mergedDir) below(m marks, name string) (*mergedDir, error) {
	s := &search{format: d.chain.format, name: name}
	s.obey(m, "", "")
	return d.descend(s)
}

// shown returns all that the directory fd shows, which lies by name in the layer above
// d, the root of a view, in a directory that merges with low: nil for one that merges with
// nothing. m are fd's marks. fd stays the caller's.
func (d *mergedDir) shown(low *mergedDir, fd int, name string, m marks) (*mergedDir, error) {
	below, err := d.orEmpty(low).below(m, name)
	if err != nil {
		return nil, err
	}
	top, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		below.close()
		return nil, err
	}
	view := &mergedDir{chain: d.chain, parts: []lowerDir{{fd: top, layer: -1, marked: m.holdsMarks}}}
	if below != nil {
		view.parts = append(view.parts, below.parts...)
	}
	return view, nil
}

// orEmpty is a directory without parts for one that merges with nothing: an absolute
// redirect leads out of that.
func (d *mergedDir) orEmpty(low *mergedDir) *mergedDir {
	if low == nil {
		return &mergedDir{chain: d.chain}
	}
	return low
}

// descend goes down the layers for s, as ovl_lookup does (fs/overlayfs/namei.c).
func (d *mergedDir) descend(s *search) (*mergedDir, error) {
	out := &mergedDir{chain: d.chain}
	err := d.each(s, func(p lowerDir) bool {
		out.parts = append(out.parts, p)
		return true
	})
	if err != nil {
		out.close()
		return nil, err
	}
	if len(out.parts) == 0 {
		return nil, nil
	}
	return out, nil
}

// openData opens the regular file name for reading its content, which metacopy (Linux
// 4.19) leaves in a lower layer than the metadata that lookup returns. A name that
// is no regular file is ENOENT.
func (d *mergedDir) openData(name string) (int, error) {
	return d.data(&search{format: d.chain.format, name: name, file: true})
}

// dataBelow opens the content of a metacopy file that lies by name in the layer above d,
// the root of a view, in a directory that merges with low, as in shown.
func (d *mergedDir) dataBelow(low *mergedDir, name string, m marks) (int, error) {
	s := &search{format: d.chain.format, name: name, file: true}
	s.obey(m, "", "")
	return d.orEmpty(low).data(s)
}

func (d *mergedDir) data(s *search) (int, error) {
	found := -1
	err := d.each(s, func(p lowerDir) bool {
		if s.metacopy {
			return false
		}
		found = p.fd
		return true
	})
	if err == nil && found < 0 {
		err = unix.ENOENT
		if s.metacopy {
			err = fmt.Errorf("no layer has the data of this metacopy: %w", unix.EIO)
		}
	}
	return found, err
}

// each calls found with what s finds in each layer; if that returns false, it closes it.
func (d *mergedDir) each(s *search, found func(lowerDir) bool) error {
	layers, fromRoot := d.parts, false
	if !s.absolute() {
		layers = d.partsFor(s.name)
	}
	for next := 0; !s.stop; {
		if s.absolute() && !fromRoot {
			// From here on the path counts from the root of each layer further down.
			layers, fromRoot = d.chain.roots, true
			next = s.below
		}
		if next >= len(layers) {
			return nil
		}
		p := layers[next]
		next++
		s.below = p.layer + 1
		hit, err := s.step(p)
		if err != nil {
			return err
		}
		if hit.fd >= 0 && !found(hit) {
			_ = sys.Close(hit.fd)
		}
	}
	return nil
}

// names returns the names that the directory shows, sorted bytewise.
func (d *mergedDir) names() ([]string, error) {
	// The first layer that has a name decides: false is a whiteout.
	shown := make(map[string]bool)
	for _, p := range d.parts {
		err := d.list(p, func(name []byte, typ uint8) error {
			if _, known := shown[string(name)]; known {
				return nil
			}
			white, err := d.listedWhiteout(p, name, typ)
			shown[string(name)] = !white
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	maps.DeleteFunc(shown, func(_ string, visible bool) bool { return !visible })
	return slices.Sorted(maps.Keys(shown)), nil
}

// listedWhiteout says whether an entry that getdents gave is a whiteout. Most types
// cannot be one, so that most need no further call.
func (d *mergedDir) listedWhiteout(p lowerDir, name []byte, typ uint8) (bool, error) {
	switch typ {
	case unix.DT_CHR, unix.DT_UNKNOWN:
	case unix.DT_REG:
		if !p.marked {
			return false, nil
		}
	default:
		return false, nil
	}
	var st unix.Stat_t
	if err := sys.Fstatat(p.fd, string(name), &st); err != nil {
		return false, err
	}
	return p.isWhiteout(string(name), &st, d.chain.format)
}

func (d *mergedDir) list(p lowerDir, each func(name []byte, typ uint8) error) error {
	r := &d.chain.dents
	if err := r.Reset(p.fd); err != nil {
		return err
	}
	for {
		name, typ, err := r.Next()
		if err != nil || name == nil {
			return err
		}
		if err := each(name, typ); err != nil {
			return err
		}
	}
}

const (
	// indexParts is the number of merging layers from which on asking each of them for
	// each name costs more than reading all their names once.
	indexParts = 8
	// indexAfter is the number of lookups that a directory must have had by then.
	indexAfter = 32
	// indexNames bounds the index's memory. A directory with more names has none.
	indexNames = 1 << 17
)

// partsFor returns the parts that may have name: none where it is known that no layer has
// it, and not those above the first that does. Layers do not change while they are read.
func (d *mergedDir) partsFor(name string) []lowerDir {
	if len(d.parts) < indexParts {
		return d.parts
	}
	if d.asked++; d.asked == indexAfter {
		d.index = d.buildIndex()
	}
	if d.index == nil {
		return d.parts
	}
	first, known := d.index[name]
	if !known {
		return nil
	}
	return d.parts[first:]
}

// errTooMany ends buildIndex early.
var errTooMany = errors.New("too many names")

// buildIndex returns nil if it cannot be had: lookups then ask each layer, and meet the error.
func (d *mergedDir) buildIndex() map[string]int {
	index := make(map[string]int)
	for i, p := range d.parts {
		err := d.list(p, func(name []byte, _ uint8) error {
			if _, known := index[string(name)]; !known {
				if len(index) == indexNames {
					return errTooMany
				}
				index[string(name)] = i
			}
			return nil
		})
		if err != nil {
			return nil
		}
	}
	return index
}

// errNeedsLowers says that a layer can't be read alone.
func errNeedsLowers(mark string) error {
	return fmt.Errorf("%s: the layers beneath must be known: %w", mark, unix.EINVAL)
}
