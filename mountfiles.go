//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/bcc2decd/overlay2/internal/sys"
)

// detachedFiles is detached with layers that are opened, strictly, and given to the kernel as
// such: what is checked is what is mounted.
func (s mountSpec) detachedFiles(attrs int) (fd int, err error) {
	if err := s.checkAll(); err != nil {
		return -1, err
	}
	s.dirs()
	homefd, err := sys.OpenRoot(s.home)
	if err != nil {
		return -1, err
	}
	fds := []int{homefd}
	defer func() {
		for _, fd := range fds {
			err = errors.Join(err, sys.Close(fd))
		}
	}()
	return s.ofFiles(func(path string, _ bool) (int, error) {
		fd, err := sys.OpenBeneath(homefd, path)
		if err != nil {
			return -1, fmt.Errorf("open %s: %w", path, err)
		}
		fds = append(fds, fd)
		return fd, nil
	}, attrs)
}

// ofFiles returns a descriptor of the overlay, in no mount table, of directories that open
// returns: each lower one, and the layer in which upper and work lie. open keeps them open.
func (s mountSpec) ofFiles(open func(path string, readOnly bool) (int, error), attrs int) (fd int, err error) {
	c, err := sys.OpenFS("overlay")
	if err != nil {
		return -1, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	c.Set("source", "overlay")
	give := func(key string, dirfd int, name string) error {
		fd, err := sys.OpenDirat(dirfd, name)
		if err != nil {
			return fmt.Errorf("open %s: %w", name, err)
		}
		c.SetFD(key, fd)
		return sys.Close(fd)
	}
	for _, lower := range s.lowers {
		dirfd, err := open(lower, true)
		if err != nil {
			return -1, err
		}
		if err := give("lowerdir+", dirfd, "."); err != nil {
			return -1, err
		}
	}
	if s.upper != "" {
		dirfd, err := open(filepath.Dir(s.upper), false)
		if err != nil {
			return -1, err
		}
		if err := errors.Join(give("upperdir", dirfd, diffName), give("workdir", dirfd, workName)); err != nil {
			return -1, err
		}
	}
	s.setOptions(c)
	return c.Mount(attrs)
}
