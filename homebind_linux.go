//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/moby/sys/mount"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Where the mount that holds the home propagates, the layers' mounts would appear in other mount namespaces and stay busy
// there. So New mounts the home on itself, privately, unless something is mounted beneath it, which that would cover. Such a
// mount outlives a process that is killed, and keeps the home from being renamed: a record of it, staging/bound-ID -> INSTANCE, lets another Driver know it from one that somebody else has
// made, use it and undo it. ID is the mount's, INSTANCE as in unsynced-*. Each Driver that uses the mount holds a
// descriptor on it, so that it is busy for the others.

// boundPrefix begins the name of a record in staging.
const boundPrefix = "bound-"

// homeBind is the mount of the home on itself.
type homeBind struct {
	mu sync.Mutex
	id int // 0 if there is none, or none of ours
	fd int // on it, while the Driver has not been cleaned up
}

// bindTries bounds how often New mounts the home while Cleanups of other Drivers unmount it.
const bindTries = 100

// makePrivate sees to it that the home lies on a mount that does not propagate.
func (d *Driver) makePrivate() error {
	for range bindTries {
		fd, id, shared, err := d.mountOfHome()
		if err != nil {
			return err
		}
		if !shared && id != 0 {
			d.bind.fd, d.bind.id = fd, id
			return nil
		}
		if err := sys.Close(fd); err != nil || !shared {
			return err
		}
		if bound, err := d.bindHome(); err != nil || !bound {
			return err
		}
		// The Cleanup of another Driver may unmount it before it is held.
	}
	return fmt.Errorf("mount of %s on itself: %w", d.home, unix.EBUSY)
}

// mountOfHome opens the home and looks at the mount that it got. The ID is 0 unless it is one of ours.
func (d *Driver) mountOfHome() (fd, id int, shared bool, err error) {
	if fd, err = sys.OpenRoot(d.home); err != nil {
		return -1, 0, false, err
	}
	if id, shared, err = d.lookAtMount(fd); err != nil {
		return -1, 0, false, errors.Join(err, sys.Close(fd))
	}
	return fd, id, shared, nil
}

// lookAtMount looks at the mount that the open home lies on.
func (d *Driver) lookAtMount(fd int) (id int, shared bool, err error) {
	own, err := sys.MountID(fd)
	if err != nil {
		return 0, false, err
	}
	m, _, err := sys.FindMount(own)
	if err != nil || m.Path != d.home {
		return 0, m.Shared, err
	}
	below, _, err := sys.FindMount(m.Parent)
	if err != nil || !m.Binds(below) {
		return 0, m.Shared, err
	}
	instance, err := sys.FSInstance(fd)
	if err != nil {
		return 0, false, err
	}
	recorded, err := sys.Readlinkat(fd, boundRecord(own))
	if err != nil && err != unix.ENOENT && err != unix.EINVAL {
		return 0, false, fmt.Errorf("%s: %w", boundRecord(own), err)
	}
	if err == nil && recorded == instance {
		id = own
	}
	return id, m.Shared, nil
}

// boundRecord returns the path of a mount's record beneath the home.
func boundRecord(id int) string { return stagingDir + "/" + boundPrefix + strconv.Itoa(id) }

// bindHome mounts the home on itself and makes that mount private. If something is mounted at the home already,
// that is made private. bound is false if neither can be.
func (d *Driver) bindHome() (bound bool, err error) {
	// Locked, so that it is mounted once, and not over what others are just trying.
	s, err := d.openStaging()
	if err != nil {
		return false, err
	}
	defer s.close()
	if err := sys.Flock(s.fd, unix.LOCK_EX); err != nil {
		return false, err
	}
	now, _, shared, err := d.mountOfHome()
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, sys.Close(now)) }()
	if !shared {
		return true, nil
	}
	own, err := sys.MountID(now)
	if err != nil {
		return false, err
	}
	m, _, err := sys.FindMount(own)
	if err != nil {
		return false, err
	}
	if m.Path == d.home {
		return true, d.unshareHome()
	}
	// It would cover what layers are mounted at, while these are in use: a later New does it.
	if used, err := sys.MountedBelow(d.home); err != nil || used {
		return false, err
	}
	if err := d.dropBound(now); err != nil {
		return false, err
	}
	// The record first: a process that is killed in between leaves a name that says nothing.
	err = sys.BindSelf(now, d.home, func(id int) error { return d.recordBound(now, id) })
	if errors.Is(err, unix.ENOSYS) { // open_tree: 5.2, commit a07b20004793
		return true, d.bindPlainly()
	}
	if err != nil {
		return false, err
	}
	return true, d.unshareHome()
}

// unshareHome makes the mount at the home private, if there is still one.
func (d *Driver) unshareHome() error {
	err := unix.Mount("", d.home, "", unix.MS_PRIVATE, "")
	if err == unix.EINVAL {
		return nil // the Cleanup of another Driver has unmounted it
	}
	return err
}

// bindPlainly is for kernels where a mount is there before anybody knows its ID.
func (d *Driver) bindPlainly() error {
	if err := mount.MakePrivate(d.home); err != nil {
		return err
	}
	fd, err := sys.OpenRoot(d.home)
	if err != nil {
		return err
	}
	id, err := sys.MountID(fd)
	if err == nil {
		err = d.recordBound(fd, id)
	}
	return errors.Join(err, sys.Close(fd))
}

// recordBound notes that a mount is ours.
func (d *Driver) recordBound(homefd, id int) error {
	instance, err := sys.FSInstance(homefd)
	if err == nil {
		err = ignoreAbsent(sys.Unlinkat(homefd, boundRecord(id), 0)) // of a former mount of this number
	}
	if err == nil {
		err = sys.Symlinkat(instance, homefd, boundRecord(id))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", boundRecord(id), err)
	}
	return nil
}

// unrecordBound removes the record of a mount that is gone, unless it is of another one by now: IDs are used again.
func (d *Driver) unrecordBound(id int) (err error) {
	s, err := d.openStaging()
	if err != nil {
		return ignoreAbsent(err)
	}
	defer s.close()
	if !lockSoon(s.fd, unix.LOCK_EX, time.Second) { // see bindHome
		return nil // a record too many says nothing: whoever mounts a mount of this ID writes it anew
	}
	fd, now, _, err := d.mountOfHome()
	if err != nil {
		return err
	}
	if now != id {
		err = ignoreAbsent(sys.Unlinkat(fd, boundRecord(id), 0))
	}
	return errors.Join(err, sys.Close(fd))
}

// dropBound removes the records of mounts that ended with the machine.
func (d *Driver) dropBound(homefd int) error {
	instance, err := sys.FSInstance(homefd)
	if err != nil {
		return err
	}
	fd, err := sys.OpenDirat(homefd, stagingDir)
	if err != nil {
		return err
	}
	var old []string
	err = sys.ReadNames(fd, func(name string) bool {
		if strings.HasPrefix(name, boundPrefix) {
			if of, err := sys.Readlinkat(fd, name); err == nil && of != instance {
				old = append(old, name)
			}
		}
		return true
	})
	for _, name := range old {
		err = errors.Join(err, ignoreAbsent(sys.Unlinkat(fd, name, 0)))
	}
	return errors.Join(err, sys.Close(fd))
}

// unmountBound unmounts what is mounted at the home if it is the mount with this ID. It is EBUSY while somebody uses it.
// done is false if it was not there any more.
func (d *Driver) unmountBound(bound int) (done bool, err error) {
	for {
		fd, id, _, err := d.mountOfHome()
		if err != nil {
			return false, err
		}
		if err := sys.Close(fd); err != nil || id != bound {
			return false, err
		}
		if err = unix.Unmount(d.home, unix.UMOUNT_NOFOLLOW); err != unix.EINVAL {
			return err == nil, err
		}
		if is, err := mountinfo.Mounted(d.home); err != nil || is {
			return false, errors.Join(unix.EINVAL, err)
		}
		// Another Driver was quicker.
	}
}

// unbindHome undoes what makePrivate did, unless layers are mounted or another Driver, of any process, uses the home.
func (d *Driver) unbindHome() error {
	b := &d.bind
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.id == 0 {
		return nil
	}
	if b.fd >= 0 {
		if err := sys.Close(b.fd); err != nil {
			return err
		}
		b.fd = -1
	}
	var wait time.Duration
	if len(d.layers.ids()) == 0 {
		wait = forkWait // a child of this process, between fork and exec, may have a copy of a descriptor
	}
	var done bool
	err := retryWhile(unix.EBUSY, wait, func() (err error) {
		done, err = d.unmountBound(b.id)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a home that is gone
	}
	switch err {
	case nil:
	case unix.EBUSY:
		return nil
	default:
		return fmt.Errorf("cleanup %s: unmount: %w", d.home, err)
	}
	id := b.id
	b.id = 0
	if !done {
		return nil // somebody else has unmounted it
	}
	return d.unrecordBound(id)
}
