//go:build linux

package limit

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Store is a home with the least that a store of layers can keep: directories named by
// number, so that the mount data is short, and the chains in memory.
type Store struct {
	workers int // 0: one thread

	home   string
	homefd int

	mu     sync.Mutex
	layers map[string]*layer
	last   int
	trash  sync.WaitGroup
	err    error
}

type layer struct {
	number string // "17": its directory below home
	parent *layer
	data   string // mount data, "" if too long
}

// NewStore returns a store that unpacks and walks with so many workers beside the
// calling thread.
func NewStore(workers int) *Store { return &Store{workers: workers, layers: map[string]*layer{}} }

// Open opens home.
func (s *Store) Open(home string, _ bool) (err error) {
	if err := unix.Mkdir(home, 0o710); err != nil && err != unix.EEXIST {
		return err
	}
	s.home = home
	s.homefd, err = openDir(unix.AT_FDCWD, home)
	return err
}

// Create makes the three directories and the three names of Docker's layout.
func (s *Store) Create(id, parent string) error {
	s.mu.Lock()
	s.last++
	l := &layer{number: strconv.Itoa(s.last), parent: s.layers[parent]}
	s.layers[id] = l
	s.mu.Unlock()
	for _, name := range []string{l.number, l.number + "/diff", l.number + "/work", l.number + "/merged"} {
		if err := unix.Mkdirat(s.homefd, name, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Symlinkat(l.number+"/diff", s.homefd, "l"+l.number); err != nil {
		return err
	}
	if err := s.write(l.number+"/link", l.number); err != nil {
		return err
	}
	if l.parent == nil {
		return nil
	}
	l.data = s.mountData(l)
	return s.write(l.number+"/lower", l.parent.number)
}

func (s *Store) write(name, text string) error {
	fd, err := unix.Openat(s.homefd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, []byte(text))
	return errors.Join(err, unix.Close(fd))
}

func (s *Store) diff(l *layer) string { return s.home + "/" + l.number + "/diff" }

func (s *Store) mountData(l *layer) string {
	var b strings.Builder
	b.WriteString("lowerdir=")
	for p := l.parent; p != nil; p = p.parent {
		b.WriteString(s.diff(p))
		if p.parent != nil {
			b.WriteByte(':')
		}
	}
	fmt.Fprintf(&b, ",upperdir=%s,workdir=%s/%s/work", s.diff(l), s.home, l.number)
	if b.Len() >= os.Getpagesize() {
		return ""
	}
	return b.String()
}

func (s *Store) layer(id string) (*layer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.layers[id]; l != nil {
		return l, nil
	}
	return nil, fmt.Errorf("no layer %s", id)
}

// Get mounts by one mount(2) where the data fits a page, else layer by layer.
func (s *Store) Get(id string) (string, error) {
	l, err := s.layer(id)
	if err != nil {
		return "", err
	}
	if l.parent == nil {
		return s.diff(l), nil
	}
	target := s.home + "/" + l.number + "/merged"
	if l.data != "" {
		return target, unix.Mount("overlay", target, "overlay", 0, l.data)
	}
	return target, s.mountNew(l, target)
}

// mountNew uses the mount API of Linux 5.2 and lowerdir+ of 6.5.
func (s *Store) mountNew(l *layer, target string) (err error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Close(fs)) }()
	for p := l.parent; p != nil; p = p.parent {
		if err := unix.FsconfigSetString(fs, "lowerdir+", s.diff(p)); err != nil {
			return err
		}
	}
	if err := unix.FsconfigSetString(fs, "upperdir", s.diff(l)); err != nil {
		return err
	}
	if err := unix.FsconfigSetString(fs, "workdir", s.home+"/"+l.number+"/work"); err != nil {
		return err
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return err
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH), unix.Close(fd))
}

// Put unmounts.
func (s *Store) Put(id string) error {
	l, err := s.layer(id)
	if err != nil || l.parent == nil {
		return err
	}
	return unix.Unmount(s.home+"/"+l.number+"/merged", unix.MNT_DETACH)
}

// Apply unpacks into the layer.
func (s *Store) Apply(id, _ string, tar io.Reader) (int64, error) {
	path, err := s.Upper(id)
	if err != nil {
		return 0, err
	}
	return 0, Unpack(path, tar, s.workers)
}

// WriteDiff packs the layer.
func (s *Store) WriteDiff(id, _ string, w io.Writer) error {
	path, err := s.Upper(id)
	if err != nil {
		return err
	}
	return Pack(path, w)
}

// Diff is WriteDiff's.
func (s *Store) Diff(string, string) (io.ReadCloser, error) { return nil, errors.ErrUnsupported }

// DiffSize walks.
func (s *Store) DiffSize(id, _ string) (int64, error) {
	path, err := s.Upper(id)
	if err != nil {
		return 0, err
	}
	return Usage(path, max(1, s.workers))
}

// Upper returns the layer's directory.
func (s *Store) Upper(id string) (string, error) {
	l, err := s.layer(id)
	if err != nil {
		return "", err
	}
	return s.diff(l), nil
}

// ChangesOf lists the changes of a layer on a base layer, or of one without a parent.
func (s *Store) ChangesOf(id, parent string) ([]Change, error) {
	upper, err := s.Upper(id)
	if err != nil {
		return nil, err
	}
	if parent == "" {
		return Changes(upper, "")
	}
	lower, err := s.Upper(parent)
	if err != nil {
		return nil, err
	}
	return Changes(upper, lower)
}

// Remove renames the layer away and deletes it behind the caller's back.
func (s *Store) Remove(id string) error {
	l, err := s.layer(id)
	if err != nil {
		return err
	}
	gone := "gone" + l.number
	if err := unix.Renameat(s.homefd, l.number, s.homefd, gone); err != nil {
		return err
	}
	if err := unix.Unlinkat(s.homefd, "l"+l.number, 0); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.layers, id)
	s.mu.Unlock()
	s.trash.Go(func() {
		if err := os.RemoveAll(filepath.Join(s.home, gone)); err != nil {
			s.mu.Lock()
			s.err = errors.Join(s.err, err)
			s.mu.Unlock()
		}
	})
	return nil
}

// Close waits for what Remove left.
func (s *Store) Close() error {
	s.trash.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
