//go:build linux

package overlay2

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// The staging directory of a home holds what is not a layer: new-RANDOM, a layer that is
// being made, trash-RANDOM, one that was removed, and trash-diff-RANDOM, the former content of
// one. A layer comes and goes by one rename between here and the home, so that whatever a crash leaves behind lies here.
const (
	newPrefix   = "new-"
	trashPrefix = "trash-"
	// Content alone has the project of its layer, whose limits stay.
	trashDiffPrefix = trashPrefix + "diff-"
	probePrefix     = "probe-"
)

// staging is the staging directory, open and locked against the recovery of another
// process that starts on the same home.
type staging struct {
	homefd, fd int
	lfd        int // -1 until links is called
}

// closedStaging has nothing open.
func closedStaging() staging { return staging{homefd: -1, fd: -1, lfd: -1} }

// openStaging opens the staging directory with a lock that many can hold.
func (d *Driver) openStaging() (*staging, error) {
	s, err := d.openUnlocked()
	if err != nil {
		return nil, err
	}
	if err := sys.Flock(s.fd, unix.LOCK_SH); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// openUnlocked is openStaging without the lock.
func (d *Driver) openUnlocked() (_ *staging, err error) {
	s := closedStaging()
	if s.homefd, err = sys.OpenRoot(d.home); err != nil {
		return nil, err
	}
	if s.fd, err = sys.OpenDirat(s.homefd, stagingDir); err != nil {
		s.close()
		return nil, fmt.Errorf("%s: %w", stagingDir, err)
	}
	return &s, nil
}

// links returns the directory l/, open until the staging directory is closed.
func (s *staging) links() (lfd int, err error) {
	if s.lfd < 0 {
		if s.lfd, err = sys.OpenDirat(s.homefd, linkDir); err != nil {
			return -1, fmt.Errorf("%s: %w", linkDir, err)
		}
	}
	return s.lfd, nil
}

func (s *staging) close() {
	for _, fd := range []int{s.fd, s.homefd, s.lfd} {
		if fd >= 0 {
			_ = sys.Close(fd) // opened for reading: nothing can be lost
		}
	}
}

// discard moves name beneath dirfd, a directory of the home, to the trash. Afterwards
// it is deleted in the background.
func (d *Driver) discard(s *staging, dirfd int, name, prefix string) (trashName string, err error) {
	trashName = prefix + rand.Text()
	if err := sys.RenameNoReplace(dirfd, name, s.fd, trashName); err != nil {
		return "", fmt.Errorf("move to trash: %w", err)
	}
	return trashName, nil
}

// recoverHome finishes what a crash interrupted, of the process or of the machine.
func (d *Driver) recoverHome() error {
	if err := d.recoverUnsynced(); err != nil {
		return err
	}
	// The deletion of records, which takes moments, holds the lock that tells whether others are at work.
	d.trash.wait()
	return d.recoverStaging()
}

// recoverStaging finishes what a crash interrupted: removals, and layers that never appeared.
func (d *Driver) recoverStaging() error {
	s, err := d.openStaging()
	if err != nil {
		return err
	}
	defer s.close()
	// A process that makes a layer now holds the lock, and its new-RANDOM is no leftover.
	alone := sys.Flock(s.fd, unix.LOCK_EX|unix.LOCK_NB) == nil
	var names []string
	if err := sys.ReadNames(s.fd, func(name string) bool {
		if strings.HasPrefix(name, trashPrefix) ||
			alone && (strings.HasPrefix(name, newPrefix) || strings.HasPrefix(name, probePrefix)) {
			names = append(names, name)
		}
		return true
	}); err != nil {
		return fmt.Errorf("%s: %w", stagingDir, err)
	}
	for _, name := range names {
		if err := dropLink(s, name); err != nil {
			return err
		}
		if !strings.HasPrefix(name, trashPrefix) {
			// Under its new name it is trash for every process, locked or not.
			if name, err = d.discard(s, s.fd, name, trashPrefix); err != nil {
				return err
			}
		}
		d.trash.add(d, name)
	}
	return nil
}

// dropLink removes the link of a layer in staging, if that link leads to no layer. Which
// link is the layer's own is what its file says; it is believed only if it fits.
func dropLink(s *staging, name string) error {
	fd, err := sys.OpenDirat(s.fd, name)
	if err == unix.ENOTDIR || err == unix.ELOOP {
		return nil // a file on its way to a layer
	}
	if err != nil {
		return ignoreAbsent(err)
	}
	defer func() { _ = sys.Close(fd) }()
	data, err := sys.ReadFileAt(fd, linkName, linkid.Length)
	if exhausted(err) {
		return fmt.Errorf("%s/%s/%s: %w", stagingDir, name, linkName, err)
	}
	if err != nil || !linkid.Valid(string(data)) {
		return nil // not made yet, or tampered with: then nobody's link is touched
	}
	link := string(data)
	target, err := sys.Readlinkat(s.homefd, linkPrefix+link)
	if err != nil {
		return ignoreAbsent(err)
	}
	if id, _ := parseLinkTarget(target); id != "" && s.absent(id) {
		if err := s.unlist(fd, link, id); err != nil {
			return err
		}
	}
	return s.removeDangling(link)
}

// removeDangling removes a link from l/ unless it leads to a layer that has it as its own, or may have.
func (s *staging) removeDangling(link string) error {
	lfd, err := s.links()
	if err != nil {
		return err
	}
	target, err := sys.Readlinkat(lfd, link)
	if err != nil {
		return ignoreAbsent(err)
	}
	if id, _ := parseLinkTarget(target); id != "" {
		fd, err := sys.OpenDirat(s.homefd, id)
		if exhausted(err) {
			return fmt.Errorf("%s: %w", id, err)
		}
		if err == nil {
			data, err := sys.ReadFileAt(fd, linkName, linkid.Length)
			_ = sys.Close(fd)
			if exhausted(err) {
				return fmt.Errorf("%s/%s: %w", id, linkName, err)
			}
			if err != nil || string(data) == link || !linkid.Valid(string(data)) {
				return nil //nolint:nilerr // then nobody knows whose it is
			}
		}
	}
	return ignoreAbsent(unix.Unlinkat(lfd, link, 0))
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// trash deletes removed layers in the background, one goroutine at a time, which ends
// when there is nothing left to delete.
type trash struct {
	mu     sync.Mutex
	items  []trashItem
	failed []trashItem // for want of descriptors or the like: deleted with the next
	// done is closed when nothing is left to delete, nil while nothing is being deleted. A WaitGroup may not be used again
	// before all who wait have returned.
	done chan struct{}
}

// trashItem is an entry of the staging directory to be deleted.
type trashItem struct {
	name string
	// unlinked says that the layer's link is gone, and that it was taken from the list of its parent's children if that can be done.
	unlinked bool
}

// add queues entries of the staging directory for deletion, and what could not be deleted before.
func (t *trash) add(d *Driver, names ...string) {
	items := make([]trashItem, len(names))
	for i, name := range names {
		items[i].name = name
	}
	t.addItems(d, items...)
}

func (t *trash) addItems(d *Driver, items ...trashItem) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.items = append(append(t.items, t.failed...), items...)
	t.failed = nil
	if t.done != nil || len(t.items) == 0 {
		return
	}
	t.done = make(chan struct{})
	go t.run(d)
}

// wait returns when everything queued so far has been deleted.
func (t *trash) wait() {
	t.mu.Lock()
	done := t.done
	t.mu.Unlock()
	if done != nil {
		<-done
	}
}

func (t *trash) run(d *Driver) {
	for {
		t.mu.Lock()
		if len(t.items) == 0 {
			close(t.done)
			t.done = nil
			t.mu.Unlock()
			return
		}
		item := t.items[0]
		t.items = t.items[1:]
		t.mu.Unlock()
		if err := d.deleteTrash(item); err != nil {
			// It stays for the next New to try again, or for this Driver.
			if exhausted(err) && !errors.Is(err, unix.EIO) {
				t.mu.Lock()
				t.failed = append(t.failed, item)
				t.mu.Unlock()
			}
			d.log.WithError(err).WithField("path", filepath.Join(d.home, stagingDir, item.name)).Warn("overlay2: deletion of a removed layer")
		}
	}
}

// deleteTrash deletes one entry of the staging directory. Mounts that somebody left in it are
// detached first: nothing behind a mount is ever deleted.
func (d *Driver) deleteTrash(item trashItem) error {
	// Without a lock: a long deletion must not look to another New like a layer being made.
	s, err := d.openUnlocked()
	if err != nil {
		return err
	}
	defer s.close()
	name := item.name
	if !strings.HasPrefix(name, trashDiffPrefix) {
		if !item.unlinked {
			err = dropLink(s, name)
		}
		if err := errors.Join(err, d.unlimit(name)); err != nil {
			return err
		}
	}
	err = sys.RemoveAllAt(s.fd, name)
	if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EBUSY) {
		if err := sys.UnmountBelow(filepath.Join(d.home, stagingDir, name)); err != nil {
			return err
		}
		err = sys.RemoveAllAt(s.fd, name)
	}
	return err
}
