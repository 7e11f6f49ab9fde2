package archive

import (
	"errors"
	"io"
	"os"
	"path"
	"strings"
	"sync"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// maxSymlinks bounds the symlinks on the way to one name, as the kernel does.
const maxSymlinks = 40

// OpenFile opens the content of a regular file of the layer in dir, a trusted host path,
// by its name in the layer's tar: what tar-split needs to put an exact tar together again,
// without a mount. For many files of one layer, see OpenFiles.
//
// The name is looked up in what the layer shows over opts.Lowers, so that a name which
// went through a symlink of a lower layer, or below a renamed directory, is found. Symlinks among
// its parents are followed within the layers, as if their root were "/"; one at its end is
// ELOOP. What is no regular file is fs.ErrNotExist. Errors are *EntryError.
func OpenFile(dir, name string, opts ReadOptions) (io.ReadCloser, error) {
	files, err := OpenFiles(dir, opts)
	if err != nil {
		return nil, &EntryError{Op: "open", Name: name, Err: err}
	}
	f, err := files.Open(name)
	return f, errors.Join(err, files.Close())
}

// Files opens files of a layer by their names in its tar. It may be used by several goroutines.
type Files struct {
	mu   sync.Mutex // a mergedDir is not for concurrent use
	root *mergedDir // nil when closed
}

// OpenFiles opens the layer in dir for OpenFile of many of its files. Close it.
func OpenFiles(dir string, opts ReadOptions) (*Files, error) {
	root, err := openLowers(append([]string{dir}, opts.Lowers...), opts.Format)
	if err != nil {
		return nil, err
	}
	return &Files{root: root}, nil
}

// Open opens one file, as OpenFile does. What it returns lives on after Close.
func (f *Files) Open(name string) (io.ReadCloser, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.root == nil {
		return nil, &EntryError{Op: "open", Name: name, Err: os.ErrClosed}
	}
	fd, err := f.root.openOwn(name)
	if err != nil {
		r := resolution{dirs: []*mergedDir{f.root}}
		fd, err = r.open(name)
		r.up(0)
	}
	if err != nil {
		return nil, &EntryError{Op: "open", Name: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Close closes the layer. More than one call is harmless.
func (f *Files) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.root.close()
	f.root = nil
	return nil
}

// openOwn opens a file that the nearest layer has at just this path, with its content: almost all of them.
// An error says only that it must be looked for.
func (d *mergedDir) openOwn(name string) (int, error) {
	dirfd := d.parts[0].fd
	dir, base := path.Split(strings.TrimPrefix(name, "./"))
	if dir != "" {
		parent, err := sys.OpenBeneath(dirfd, strings.TrimSuffix(dir, "/"))
		if err != nil {
			return -1, err
		}
		defer func() { _ = sys.Close(parent) }() // O_PATH: nothing can be lost
		dirfd = parent
	}
	if strings.IndexByte(base, 0) >= 0 {
		return -1, unix.EINVAL // a sys.Name would end there
	}
	fd, err := sys.OpenRegular(dirfd, sys.MakeName(base))
	if err != nil {
		return -1, err
	}
	marks, err := readMarks(fd, d.chain.format)
	if err == nil && (marks.metacopy || marks.whiteout) {
		err = unix.ENODATA
	}
	if err != nil {
		return -1, errors.Join(err, sys.Close(fd))
	}
	return fd, nil
}

// resolution follows one name through a merged view.
type resolution struct {
	// dirs is the way from the root.
	dirs []*mergedDir
	// links is the number of symlinks followed.
	links int
}

// up goes back to the directory at depth, 0 is the root.
func (r *resolution) up(depth int) {
	for len(r.dirs)-1 > max(depth, 0) {
		last := len(r.dirs) - 1
		r.dirs[last].close()
		r.dirs = r.dirs[:last]
	}
}

func (r *resolution) open(name string) (int, error) {
	todo := strings.Split(name, "/")
	if todo[len(todo)-1] == "" {
		return -1, unix.ENOENT // a directory's name, or none
	}
	for len(todo) > 0 {
		comp := todo[0]
		todo = todo[1:]
		switch comp {
		case "", ".":
			continue
		case "..":
			r.up(len(r.dirs) - 2)
			continue
		}
		at := r.dirs[len(r.dirs)-1]
		e, err := at.lookup(comp)
		if err != nil {
			return -1, err
		}
		switch {
		case !e.exists:
			return -1, unix.ENOENT
		case len(todo) == 0 && e.st.Mode&unix.S_IFMT == unix.S_IFLNK:
			return -1, unix.ELOOP
		case len(todo) == 0:
			return at.openData(comp)
		case e.st.Mode&unix.S_IFMT == unix.S_IFLNK:
			if todo, err = r.follow(e.dirfd, comp, todo); err != nil {
				return -1, err
			}
		default:
			next, err := at.child(comp)
			if err == nil && next == nil {
				err = unix.ENOTDIR
			}
			if err != nil {
				return -1, err
			}
			r.dirs = append(r.dirs, next)
		}
	}
	return -1, unix.EISDIR
}

// follow puts the target of a symlink in front of what is left of the name.
func (r *resolution) follow(dirfd int, link string, todo []string) ([]string, error) {
	if r.links++; r.links > maxSymlinks {
		return nil, unix.ELOOP
	}
	target, err := sys.Readlinkat(dirfd, link)
	if err != nil {
		return nil, err
	}
	if target == "" {
		return nil, errors.Join(ErrChanged, unix.ENOENT)
	}
	if target[0] == '/' {
		r.up(0)
	}
	return append(strings.Split(target, "/"), todo...), nil
}
