package archive

import (
	"errors"
	"fmt"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// search is one name on its way down the layers; ovl_lookup_data in the kernel.
type search struct {
	format Format
	// name is one component, or an absolute path once a redirect said so.
	name string
	// file says that a regular file is sought, not a directory.
	file bool
	// below is the first layer that was not looked at.
	below int
	// stop says that no lower layer shows through.
	stop bool
	// metacopy says that the last file found has its data further down.
	metacopy bool
}

func (s *search) absolute() bool { return s.name[0] == '/' }

// step looks for s.name in one layer, beneath p. A hit with fd -1 is none.
func (s *search) step(p lowerDir) (lowerDir, error) {
	if !s.absolute() {
		return s.single(p, s.name, "", "")
	}
	base := p
	// What is left is counted from the end: a redirect on the way rewrites what is in front.
	for rest := len(s.name) - 1; ; {
		at := len(s.name) - rest
		comp, _, more := strings.Cut(s.name[at:], "/")
		rest -= len(comp) + 1
		hit, err := s.single(base, comp, s.name[:at], s.name[at+len(comp):])
		if base.fd != p.fd {
			_ = sys.Close(base.fd)
		}
		if err != nil || hit.fd < 0 || !more {
			return hit, err
		}
		base = hit
	}
}

// single looks for comp, one component of the name pre+comp+post, in the directory p.
func (s *search) single(p lowerDir, comp, pre, post string) (lowerDir, error) {
	hit := lowerDir{fd: -1, layer: p.layer}
	var err error
	if s.file && post == "" {
		hit.fd, err = s.openFile(p.fd, comp)
	} else {
		hit.fd, err = sys.OpenDirat(p.fd, comp)
	}
	switch {
	case isNotThere(err):
		return hit, nil
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		// A whiteout, or something that hides what is beneath it all the same.
		s.stop = true
		return hit, nil
	case err != nil:
		return hit, err
	}
	m, err := readMarks(hit.fd, s.format)
	if err != nil {
		_ = sys.Close(hit.fd)
		return lowerDir{fd: -1}, err
	}
	s.obey(m, pre, post)
	hit.marked = m.holdsMarks
	return hit, nil
}

// openFile opens name if it is a regular file, else it is ENOTDIR.
func (s *search) openFile(dirfd int, name string) (int, error) {
	fd, err := sys.OpenRegular(dirfd, sys.MakeName(name))
	if errors.Is(err, sys.ErrNotRegular) {
		err = unix.ENOTDIR
	}
	return fd, err
}

// obey takes in what the marks of a file or directory say about the layers further
// down; it was found by the last component of s.name before post.
func (s *search) obey(m marks, pre, post string) {
	file := s.file && post == ""
	if file {
		s.metacopy = m.metacopy
	}
	if m.opaque || (file && !m.metacopy) {
		s.stop = true
		return
	}
	switch {
	case m.redirect == "":
	case m.redirect[0] == '/':
		s.name = m.redirect + post
		// It leads away from whatever was opaque on the way here.
		s.stop = false
	default:
		s.name = pre + m.redirect + post
	}
}

// marks are the kernel's private xattrs that say how a directory or file of a layer
// goes together with the layers beneath it (Documentation/filesystems/overlayfs.rst).
type marks struct {
	// opaque: nothing beneath shows through.
	opaque bool
	// holdsMarks: the directory may hold whiteouts that are files with an xattr.
	holdsMarks bool
	// metacopy: the file's data lies beneath.
	metacopy bool
	// whiteout: the file, if it is empty and in a directory with holdsMarks, is a whiteout.
	whiteout bool
	// redirect is the name that the layers beneath have it by: a component or, with a
	// leading slash, a path from their roots. Empty is none.
	redirect string
}

// readMarks reads the marks of an open file or directory.
func readMarks(fd int, f Format) (marks, error) {
	if f == Merged {
		return marks{}, nil
	}
	list, err := listXattrs(fd)
	if err != nil {
		return marks{}, err
	}
	return parseMarks(fd, f, list)
}

// parseMarks reads the marks among the xattr names in list, which are fd's.
func parseMarks(fd int, f Format, list []byte) (marks, error) {
	var m marks
	if f == Merged {
		return m, nil
	}
	for len(list) > 0 {
		end := 0
		for end < len(list) && list[end] != 0 {
			end++
		}
		attr := string(list[:end])
		list = list[min(end+1, len(list)):]
		mark, ok := strings.CutPrefix(attr, f.xattrPrefix())
		if !ok {
			continue
		}
		if err := m.read(fd, f, attr, mark); err != nil {
			return m, err
		}
	}
	return m, nil
}

func (m *marks) read(fd int, f Format, attr, mark string) error {
	switch mark {
	case "opaque", "redirect", "metacopy":
	case "whiteout":
		m.whiteout = true
		return nil
	default:
		return nil
	}
	value, err := sys.Fgetxattr(fd, attr)
	if err != nil {
		return fmt.Errorf("%s: %w", attr, err)
	}
	switch mark {
	case "opaque":
		m.opaque = string(value) == "y"
		m.holdsMarks = string(value) == "x"
		return nil
	case "metacopy":
		m.metacopy = true
	case "redirect":
		m.redirect = string(value)
		if !validRedirect(m.redirect) {
			return fmt.Errorf("%s: %q is no name: %w", attr, value, unix.EINVAL)
		}
	}
	if f == OverlayUser {
		// The kernel refuses to follow these with userxattr: whoever can write to a layer
		// could set them. It says EPERM as well.
		return fmt.Errorf("%s is not allowed with userxattr: %w", attr, unix.EPERM)
	}
	return nil
}

// validRedirect says whether each component can be given to the kernel beneath a handle.
func validRedirect(redirect string) bool {
	rest, absolute := strings.CutPrefix(redirect, "/")
	if !absolute && strings.Contains(rest, "/") {
		return false
	}
	for comp := range strings.SplitSeq(rest, "/") {
		if comp == "" || comp == "." || comp == ".." || strings.IndexByte(comp, 0) >= 0 {
			return false
		}
	}
	return true
}

// listXattrs returns the names of an open descriptor's xattrs, each ended by a NUL; none on
// a filesystem that has no xattrs.
func listXattrs(fd int) ([]byte, error) {
	// Asking for the length first: most files have none.
	size, err := sys.Flistxattr(fd, nil)
	if noXattr(err) || (err == nil && size == 0) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for size = 1 << 10; ; size <<= 6 {
		buf := make([]byte, size)
		n, err := sys.Flistxattr(fd, buf)
		if err == nil {
			return buf[:n], nil
		}
		if !errors.Is(err, unix.ERANGE) || size > 64<<10 {
			return nil, err
		}
	}
}

// noXattr says that a file has no such xattr, or its filesystem none at all.
func noXattr(err error) bool {
	return errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP)
}
