//go:build linux

package limit

import (
	"errors"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// tree is a queue of directories that workers take from.
type tree struct {
	mu      sync.Mutex
	more    sync.Cond
	pending []int // open directories
	open    int   // those pending or being read
	failed  error
}

// Usage adds up the sizes of all but directories, hard links once, with some threads.
func Usage(dir string, workers int) (int64, error) {
	fd, err := openDir(unix.AT_FDCWD, dir)
	if err != nil {
		return 0, err
	}
	t := &tree{pending: []int{fd}, open: 1}
	t.more.L = &t.mu
	var total atomic.Int64
	var links sync.Map
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			buf := make([]byte, 64<<10)
			for {
				fd, ok := t.take()
				if !ok {
					return
				}
				size, err := t.sum(fd, buf, &links)
				total.Add(size)
				t.done(errors.Join(err, unix.Close(fd)))
			}
		})
	}
	group.Wait()
	return total.Load(), t.failed
}

func (t *tree) take() (int, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.pending) == 0 {
		if t.open == 0 {
			return -1, false
		}
		t.more.Wait()
	}
	fd := t.pending[len(t.pending)-1]
	t.pending = t.pending[:len(t.pending)-1]
	return fd, true
}

func (t *tree) add(fd int) {
	t.mu.Lock()
	t.pending = append(t.pending, fd)
	t.open++
	t.mu.Unlock()
	t.more.Signal()
}

func (t *tree) done(err error) {
	t.mu.Lock()
	t.open--
	t.failed = errors.Join(t.failed, err)
	last := t.open == 0
	t.mu.Unlock()
	if last {
		t.more.Broadcast()
	}
}

func (t *tree) sum(dirfd int, buf []byte, links *sync.Map) (size int64, err error) {
	list, err := names(dirfd, buf)
	if err != nil {
		return 0, err
	}
	for _, n := range list {
		if n.kind == unix.DT_DIR {
			fd, err := openDir(dirfd, n.name)
			if err != nil {
				return size, err
			}
			t.add(fd)
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(dirfd, n.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return size, err
		}
		if st.Nlink > 1 {
			if _, seen := links.LoadOrStore(inode{uint64(st.Dev), st.Ino}, true); seen {
				continue
			}
		}
		size += st.Size
	}
	return size, nil
}

// Change is a path and what happened to it: 'A', 'C' or 'D'.
type Change struct {
	Kind byte
	Path string
}

// Changes lists what an upper directory changes of a lower one, "" for none. A file in
// both is taken as changed: overlayfs copies up nothing else but what is opened for writing.
func Changes(upper, lower string) ([]Change, error) {
	up, err := openDir(unix.AT_FDCWD, upper)
	if err != nil {
		return nil, err
	}
	low := -1
	if lower != "" {
		if low, err = openDir(unix.AT_FDCWD, lower); err != nil {
			return nil, errors.Join(err, unix.Close(up))
		}
	}
	c := &comparer{buf: make([]byte, 64<<10)}
	err = c.dir(up, low, "/")
	if low >= 0 {
		err = errors.Join(err, unix.Close(low))
	}
	return c.list, errors.Join(err, unix.Close(up))
}

type comparer struct {
	buf  []byte
	list []Change
}

func (c *comparer) dir(up, low int, prefix string) error {
	list, err := names(up, c.buf)
	if err != nil {
		return err
	}
	for _, n := range list {
		var st unix.Stat_t
		kind := byte('A')
		if low >= 0 && unix.Fstatat(low, n.name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			kind = 'C'
		}
		if n.kind == unix.DT_CHR {
			if err := unix.Fstatat(up, n.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return err
			}
			if st.Rdev == 0 {
				kind = 'D'
			}
		}
		c.list = append(c.list, Change{kind, prefix + n.name})
		if n.kind == unix.DT_DIR {
			if err := c.child(up, low, n.name, prefix, kind); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *comparer) child(up, low int, name, prefix string, kind byte) error {
	fd, err := openDir(up, name)
	if err != nil {
		return err
	}
	below := -1
	if kind == 'C' {
		if below, err = openDir(low, name); err != nil && !errors.Is(err, unix.ENOTDIR) {
			return errors.Join(err, unix.Close(fd))
		}
	}
	err = c.dir(fd, below, prefix+name+"/")
	if below >= 0 {
		err = errors.Join(err, unix.Close(below))
	}
	return errors.Join(err, unix.Close(fd))
}
