//go:build linux

package overlay2

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// What is not on disk yet is recorded in directories of staging, unsynced-INSTANCE-RANDOM. An
// entry is a symlink, because names and short symlinks are all that a filesystem
// writes in order and at once: when power is cut a file may be there and have no content, but no layer
// is there without the entry that was made before it. For the layer with the short name LINK:
//
//	create-LINK -> the parent's short name, or "-"      link and lower may be empty,
//	                                                    and what was applied may be missing
//	readwrite-LINK -> the parent's short name, or "-"   link and lower may be empty
//	apply-LINK -> what the incomplete marker held       the content may be anything
//
// INSTANCE tells whether power was cut since; see sys.FSInstance. A batch of entries is
// dropped by one rename of their directory, after the sync. Its owner holds a lock on it.
const (
	unsyncedPrefix  = "unsynced-"
	createPrefix    = "create-"
	readWritePrefix = "readwrite-"
	applyPrefix     = "apply-"
	noParent        = "-"
	// failedInstance stands for INSTANCE when writing to the disk has failed: it is never the current one.
	failedInstance = "failed"
)

// What leave takes for the id of a layer; no layer has such an id.
const (
	syncNothing = ""
	syncWhole   = "/"
)

// syncer syncs layers to the disk in batches.
//
// Lock order: flushing, then mu, which is held for moments only.
type syncer struct {
	// flushing is held while batches are on their way to the disk.
	flushing sync.Mutex

	mu      sync.Mutex
	batch   *batch   // takes new entries; nil if there are none yet
	adopted []*batch // left by a process that is no more
	timer   *time.Timer
	due     time.Time
	// err is the first error of writing to the disk. The kernel drops what it could not write
	// and tells once: afterwards no sync proves anything, and records stay for the next boot.
	err error
}

// batch is a directory of entries.
type batch struct {
	name  string
	fd    int
	users sync.WaitGroup // calls that have not finished what their entry is about
	// Protected by syncer.mu:
	whole bool     // the whole filesystem must be synced
	ids   []string // of layers that were made, unless whole
}

// join returns the batch that takes new entries. The caller ends with leave.
func (d *Driver) join(s *staging) (*batch, error) {
	d.syncer.mu.Lock()
	defer d.syncer.mu.Unlock()
	if d.syncer.batch == nil {
		b := &batch{name: unsyncedPrefix + d.instance + "-" + rand.Text(), fd: -1}
		// Made and locked under another name, so that no New takes it for one that was left.
		tmp := newPrefix + rand.Text()
		if err := sys.Mkdirat(s.fd, tmp, 0o700); err != nil {
			return nil, fmt.Errorf("%s: %w", stagingDir, err)
		}
		var err error
		if b.fd, err = sys.OpenDirat(s.fd, tmp); err == nil {
			if err = sys.Flock(b.fd, unix.LOCK_EX|unix.LOCK_NB); err == nil {
				err = unix.Renameat(s.fd, tmp, s.fd, b.name)
			}
			if err != nil {
				_ = sys.Close(b.fd)
			}
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%s/%s: %w", stagingDir, b.name, err), sys.Unlinkat(s.fd, tmp, unix.AT_REMOVEDIR))
		}
		d.syncer.batch = b
	}
	d.syncer.batch.users.Add(1)
	return d.syncer.batch, nil
}

// leave ends a use of the batch and makes sure that it is synced in time: the files of the layer
// id that was made, the whole filesystem, or nothing.
func (d *Driver) leave(b *batch, id string, delay time.Duration) {
	d.syncer.mu.Lock()
	if id != syncNothing && !b.whole {
		b.ids = append(b.ids, id)
		if id == syncWhole || len(b.ids) > maxFilesSynced {
			b.whole, b.ids = true, nil
		}
	}
	b.users.Done()
	d.schedule(delay)
	d.syncer.mu.Unlock()
}

// schedule makes the background flush after delay at the latest. syncer.mu is held.
func (d *Driver) schedule(delay time.Duration) {
	due := time.Now().Add(delay)
	if d.syncer.timer != nil && (due.After(d.syncer.due) || !d.syncer.timer.Stop()) {
		return // early enough, or at it right now
	}
	d.syncer.due = due
	d.syncer.timer = time.AfterFunc(delay, func() {
		if err := d.flush(false); err != nil {
			d.log.WithError(err).Error("overlay2: sync in the background")
		}
	})
}

// Sync returns when all layers, as they are now, are on the disk: what was made, filled
// and removed before, and what was written through their mounts.
func (d *Driver) Sync() error {
	err := d.flush(false)
	if err == nil {
		err = d.syncHome()
	}
	if err != nil {
		return fmt.Errorf("sync %s: %w", d.home, err)
	}
	return nil
}

// syncHome syncs the filesystem of the home.
func (d *Driver) syncHome() error {
	fd, err := sys.OpenRoot(d.home)
	if err != nil {
		return err
	}
	return errors.Join(d.syncfs(fd), sys.Close(fd))
}

// syncfs syncs the filesystem of fd. After an error it always fails.
func (d *Driver) syncfs(fd int) error {
	return d.synced(sys.Syncfs(fd))
}

// synced takes the result of a sync, and returns the first error of all of them.
func (d *Driver) synced(err error) error {
	d.syncer.mu.Lock()
	defer d.syncer.mu.Unlock()
	if d.syncer.err == nil {
		d.syncer.err = err
	}
	return d.syncer.err
}

// distrust marks batches whose content may never reach the disk, so that nobody takes a later
// sync for theirs: the next New treats them as if power had been cut.
func (d *Driver) distrust(batches []*batch) error {
	s, err := d.openStaging()
	if err != nil {
		return err
	}
	defer s.close()
	for _, b := range batches {
		err = errors.Join(err, ignoreAbsent(unix.Renameat(s.fd, b.name, s.fd, unsyncedPrefix+failedInstance+"-"+rand.Text())))
	}
	return err
}

// again keeps batches for another try if it is not the disk that failed but, say, descriptors that ran out.
func (d *Driver) again(batches []*batch) {
	d.syncer.mu.Lock()
	defer d.syncer.mu.Unlock()
	d.syncer.adopted = append(d.syncer.adopted, batches...)
	d.schedule(applyDelay)
}

// diskFailed reports whether a sync has failed.
func (d *Driver) diskFailed() bool {
	d.syncer.mu.Lock()
	defer d.syncer.mu.Unlock()
	return d.syncer.err != nil
}

// flush syncs what waits for that, and drops its record. If it could not even begin, it tries again
// later; the last flush leaves the records to the next New, and holds nothing on a disk that may be dead.
func (d *Driver) flush(last bool) error {
	d.syncer.flushing.Lock()
	defer d.syncer.flushing.Unlock()
	d.syncer.mu.Lock()
	batches := d.syncer.adopted
	if d.syncer.batch != nil {
		batches = append(batches, d.syncer.batch)
	}
	d.syncer.adopted, d.syncer.batch = nil, nil
	if d.syncer.timer != nil {
		d.syncer.timer.Stop()
		d.syncer.timer = nil
	}
	err := d.syncer.err
	d.syncer.mu.Unlock()
	if len(batches) == 0 {
		return err
	}
	if err == nil {
		err = ignoreAbsent(d.syncBatches(batches)) // a home that is gone needs it no more
	}
	switch {
	case err == nil:
	case d.diskFailed():
		err = errors.Join(err, d.distrust(batches))
	case !last:
		d.again(batches)
		return err
	}
	for _, b := range batches {
		err = errors.Join(err, sys.Close(b.fd))
	}
	return err
}

// syncBatches brings batches to the disk and drops them.
func (d *Driver) syncBatches(batches []*batch) error {
	s, err := d.openStaging()
	if err != nil {
		return err
	}
	defer s.close()
	whole := false
	for _, b := range batches {
		b.users.Wait() // nobody joins any more: the syncer has it no longer
		whole = whole || b.whole
	}
	// Files alone will do where metadata is written in order: then it is on the disk with the last fsync.
	if whole || d.facts.backingFS != "extfs" && d.facts.backingFS != "xfs" {
		if err := d.syncfs(s.fd); err != nil {
			return err
		}
	} else {
		for _, b := range batches {
			if err := d.syncLayers(s, b.ids); err != nil {
				return err
			}
		}
	}
	return d.dropBatches(s, batches)
}

// syncLayers syncs the files of layers that were made. One that is gone needs it no more.
func (d *Driver) syncLayers(s *staging, ids []string) error {
	for _, id := range ids {
		for _, name := range []string{linkName, lowerName} {
			fd, err := sys.Openat(s.homefd, id+"/"+name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
			if err == nil {
				err = errors.Join(d.synced(sys.Fdatasync(fd)), sys.Close(fd))
			}
			if err := ignoreAbsent(err); err != nil {
				return fmt.Errorf("%s/%s: %w", id, name, err)
			}
		}
	}
	return nil
}

// dropBatches takes the record of what is on the disk now away, on the disk too.
func (d *Driver) dropBatches(s *staging, batches []*batch) error {
	for _, b := range batches {
		trashName, err := d.discard(s, s.fd, b.name, trashPrefix)
		if errors.Is(err, fs.ErrNotExist) {
			continue // dropped by a try that failed after it
		}
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Join(stagingDir, b.name), err)
		}
		d.trash.add(d, trashName)
	}
	return d.synced(sys.Fsync(s.fd))
}

// recordCreate notes a layer that is going to appear. The batch is to be left when it has.
func (d *Driver) recordCreate(s *staging, entry, parentLink string) (*batch, error) {
	b, err := d.join(s)
	if err != nil {
		return nil, err
	}
	if err := sys.Symlinkat(parentLink, b.fd, entry); err != nil {
		d.leave(b, syncNothing, createDelay)
		return nil, fmt.Errorf("%s/%s: %w", stagingDir, b.name, err)
	}
	return b, nil
}

// recordBegin makes sure that a power cut before the end of an apply is known afterwards: the
// marker of the layer is on the disk, or the note that the layer was made stays until it is.
// Otherwise a layer might be found as it was before an apply that had ended well.
func (d *Driver) recordBegin(l *layer, link string) error {
	d.syncer.mu.Lock()
	noted := false
	if b := d.syncer.batch; b != nil { // it is synced as a whole, later than the marker was made
		var st unix.Stat_t
		noted = sys.Fstatat(b.fd, createPrefix+link, &st) == nil
		b.whole = b.whole || noted
	}
	d.syncer.mu.Unlock()
	if noted {
		return nil
	}
	if err := d.synced(sys.Fsync(l.fd)); err != nil {
		return fmt.Errorf("%s: sync: %w", incompleteName, err)
	}
	return nil
}

// recordApply turns the marker of a layer that is being filled into the note that it is not on
// the disk, by one rename: at any moment one of them is there. link is the layer's; one that was turned, so that nothing is mounted
// over the layer, leads to it again in the end.
func (d *Driver) recordApply(l *layer, s *staging, link string, turned bool) error {
	b, err := d.join(s)
	if err != nil {
		return err
	}
	defer d.leave(b, syncWhole, applyDelay)
	if err := l.noteApplied(b, applyPrefix+link); err != nil {
		return err
	}
	if turned { // before the batch can be synced
		if err := s.setLink(link, linkTarget(l.id)); err != nil {
			return errors.Join(err, l.markIncomplete())
		}
	}
	return nil
}

// noteApplied turns the marker into an entry of the batch.
func (l *layer) noteApplied(b *batch, entry string) error {
	switch err := sys.RenameNoReplace(l.fd, incompleteName, b.fd, entry); err {
	case nil:
		return nil
	case unix.EEXIST:
		// Filled twice within a batch: the first note tells what was there before both.
	case unix.EXDEV: // a layer with a project id of its own
		mark, err := l.incomplete()
		if err == nil {
			err = sys.Symlinkat(mark, b.fd, entry)
		}
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("%s/%s: %w", stagingDir, b.name, err)
		}
	default:
		return fmt.Errorf("%s: %w", incompleteName, err)
	}
	return l.unmarkIncomplete()
}
