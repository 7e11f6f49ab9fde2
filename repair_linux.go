//go:build linux

package overlay2

import (
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// repairWait is how long Repair waits for calls of others: making and removing a layer, and what
// works on one layer.
const repairWait = 10 * time.Second

// Repair mends what Check finds, as far as it is certain what is right, and returns what it did, or would
// do. What was lost is written anew from what else says it: l/ from link files and the reverse,
// lower files from the layers above. Nothing is deleted that could be wanted: the content of layers is never touched,
// and layers that nothing leads to go only if RemoveOrphans says so, and never what holds something that is no layer's. What cannot be mended stays as it is, and
// stays reported by Check and refused with ErrCorrupt, ErrIncomplete or ErrUnsynced by other calls.
//
// Each action is atomic, and on the disk when Repair returns. Killed at any moment, it can be called
// again. Other processes may use the home, but not dockerd, which takes no locks. Actions that could not be done
// have an error, and Repair has too. A home that cannot be read for want of memory, descriptors or a working disk
// is an error, and nothing is done.
func (d *Driver) Repair(opts RepairOpts) ([]Action, error) {
	actions, err := d.repair(opts)
	if err != nil {
		return actions, fmt.Errorf("repair %s: %w", d.home, err)
	}
	return actions, nil
}

// PlanRepair is Repair with DryRun without a Driver: it writes nothing, so that the home may be dockerd's and in use, or on a
// filesystem that is mounted read-only.
func PlanRepair(home string, opts RepairOpts) ([]Action, error) {
	actions, err := planHome(home, opts)
	if err != nil {
		return nil, fmt.Errorf("repair %s: %w", home, err)
	}
	return actions, nil
}

func planHome(home string, opts RepairOpts) (actions []Action, err error) {
	h, err := readHome(home)
	if err != nil {
		return nil, err
	}
	defer h.close()
	if _, err := h.settle(); err != nil {
		return nil, err
	}
	steps, err := h.plan(opts)
	for _, step := range steps {
		actions = append(actions, step.Action)
	}
	return actions, err
}

func (d *Driver) repair(opts RepairOpts) (actions []Action, err error) {
	if opts.DryRun {
		return planHome(d.home, opts)
	}
	r := &repairer{d: d, staging: closedStaging()}
	defer r.staging.close()
	if err := r.lock(); err != nil {
		return nil, err
	}
	if r.h, err = readHome(d.home); err != nil {
		return nil, err
	}
	defer r.h.close()
	r.h.alone = true
	if err := r.h.readStaging(); err != nil {
		return nil, err
	}
	if _, err := r.h.settle(); err != nil {
		return nil, err
	}
	steps, err := r.h.plan(opts)
	if err != nil {
		return nil, err
	}
	for _, step := range steps {
		a := step.Action
		if a.Err = step.do(r); a.Err != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", a.Path, a.Err))
		}
		actions = append(actions, a)
	}
	if len(actions) == 0 {
		return nil, nil
	}
	d.known.forgetAll()
	d.sizes.Clear()
	return actions, errors.Join(err, d.syncfs(r.staging.homefd))
}

// repairer carries out actions. It holds the staging directory, so that no layer is made or removed.
type repairer struct {
	d       *Driver
	h       *homeState
	staging staging
}

func (r *repairer) lock() (err error) {
	if r.staging.homefd, err = sys.OpenRoot(r.d.home); err != nil {
		return err
	}
	if r.staging.fd, err = sys.OpenDirat(r.staging.homefd, stagingDir); err != nil {
		return fmt.Errorf("%s: %w", stagingDir, err)
	}
	if !lockSoon(r.staging.fd, unix.LOCK_EX, repairWait) {
		return fmt.Errorf("%w: layers are being made or removed all the time", ErrLayerInUse)
	}
	return nil
}

// withLayer calls f with an open layer on which no other call works.
func (r *repairer) withLayer(id string, f func(l *layer) error) error {
	l, err := openLayer(r.d.home, id)
	if err != nil {
		return err
	}
	defer l.close()
	// Not awaited for ever: who holds it may wait for the staging directory.
	if !lockSoon(l.fd, unix.LOCK_EX, repairWait/10) {
		return fmt.Errorf("%w: another call works on it", ErrLayerInUse)
	}
	return f(l)
}

// write replaces one of a layer's files.
func (r *repairer) write(id, name, content string, mode uint32) error {
	return r.withLayer(id, func(l *layer) error {
		tmp := newPrefix + rand.Text()
		if err := r.writeSynced(r.staging.fd, tmp, content, mode); err != nil {
			return err
		}
		err := replaceName(r.staging.fd, tmp, l.fd, name)
		if err == nil {
			return nil
		}
		err = errors.Join(err, sys.Unlinkat(r.staging.fd, tmp, 0))
		if !errors.Is(err, unix.EXDEV) {
			return err
		}
		// A layer with a project of its own takes nothing from elsewhere.
		tmp = name + newSuffix
		if err := ignoreAbsent(sys.Unlinkat(l.fd, tmp, 0)); err != nil {
			return err
		}
		if err := r.writeSynced(l.fd, tmp, content, mode); err != nil {
			return err
		}
		return replaceName(l.fd, tmp, l.fd, name)
	})
}

// writeSynced makes a file whose content is on the disk.
func (r *repairer) writeSynced(dirfd int, name, content string, mode uint32) error {
	if err := sys.WriteFileAt(dirfd, name, []byte(content), mode); err != nil {
		return err
	}
	fd, err := sys.Openat(dirfd, name, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	if st := r.h.home; st.uid != 0 {
		if err := sys.Fchown(fd, st.uid, ^uint32(0)); err != nil {
			return errors.Join(err, sys.Close(fd))
		}
	}
	return errors.Join(r.d.synced(sys.Fsync(fd)), sys.Close(fd))
}

// replaceName renames a file to a name at which something else may lie. A directory there goes if it is empty.
func replaceName(olddir int, oldname string, newdir int, newname string) error {
	err := unix.Renameat(olddir, oldname, newdir, newname)
	if err == unix.EISDIR || err == unix.EEXIST || err == unix.ENOTEMPTY {
		if err := sys.Unlinkat(newdir, newname, unix.AT_REMOVEDIR); err != nil {
			return fmt.Errorf("a directory with something in it: %w", err)
		}
		err = unix.Renameat(olddir, oldname, newdir, newname)
	}
	return err
}

// setLink makes an entry of l/ lead to target.
func (r *repairer) setLink(link, target string) error {
	tmp := newPrefix + rand.Text()
	if err := sys.Symlinkat(target, r.staging.fd, tmp); err != nil {
		return err
	}
	if err := replaceName(r.staging.fd, tmp, r.h.lfd, link); err != nil {
		return errors.Join(err, sys.Unlinkat(r.staging.fd, tmp, 0))
	}
	return nil
}

// removeLink removes an entry of l/ if it is still what it was.
func (r *repairer) removeLink(link, target string) error {
	now, err := sys.Readlinkat(r.h.lfd, link)
	if err != nil || now != target {
		return ignoreAbsent(err)
	}
	return sys.Unlinkat(r.h.lfd, link, 0)
}

// removeLower removes what lies in the place of a base layer's lower file.
func (r *repairer) removeLower(id string) error {
	return r.withLayer(id, func(l *layer) error { return removeName(l.fd, lowerName) })
}

// removeName removes anything but a directory with something in it.
func removeName(dirfd int, name string) error {
	err := sys.Unlinkat(dirfd, name, 0)
	if err == unix.EISDIR || err == unix.EPERM {
		err = sys.Unlinkat(dirfd, name, unix.AT_REMOVEDIR)
	}
	return ignoreAbsent(err)
}

// list adds a child to the list of its parent's children.
func (r *repairer) list(parent, link, id string) error {
	return r.withLayer(parent, func(l *layer) error {
		fd, err := l.makeList()
		if err != nil || fd < 0 {
			return err
		}
		name, target := childEntry(link, id)
		if err = sys.Symlinkat(target, fd, name); err == unix.EEXIST {
			err = nil
		}
		return errors.Join(err, sys.Close(fd))
	})
}

// removeList removes what lies in the place of a list of children.
func (r *repairer) removeList(id string) error {
	return r.withLayer(id, func(l *layer) error { return removeName(l.fd, childrenName) })
}

// makeWork makes a layer's work directory.
func (r *repairer) makeWork(id string) error {
	return r.withLayer(id, func(l *layer) error {
		if err := sys.IsDirat(l.fd, workName); err == unix.ENOTDIR {
			if err := removeName(l.fd, workName); err != nil {
				return err
			}
		}
		return r.d.checkWork(l)
	})
}

// removeMerged removes a mount point that nothing is mounted on, or what lies in its place.
func (r *repairer) removeMerged(id string) error {
	return r.withLayer(id, func(l *layer) error {
		if err := l.checkUnused(); err != nil {
			return err
		}
		switch err := sys.IsDirat(l.fd, mergedName); err {
		case unix.ENOENT:
			return nil
		case unix.ENOTDIR:
			return removeName(l.fd, mergedName)
		}
		if mounted, err := l.mounted(); err != nil || mounted {
			return err
		}
		return sys.Unlinkat(l.fd, mergedName, unix.AT_REMOVEDIR)
	})
}

// discardLeftover throws away what a crash left in the staging directory.
func (r *repairer) discardLeftover(name string) error {
	if err := dropLink(&r.staging, name); err != nil {
		return err
	}
	trashName, err := r.d.discard(&r.staging, r.staging.fd, name, trashPrefix)
	if err != nil {
		return err
	}
	r.d.trash.add(r.d, trashName)
	return nil
}

// discardLayer throws a layer away that no link leads to.
func (r *repairer) discardLayer(id string) error {
	return r.withLayer(id, func(l *layer) error {
		unread, err := l.refuseOthers()
		if err != nil {
			return err
		}
		defer unread.drop()
		if mounted, err := l.mounted(); err != nil || mounted {
			return errors.Join(ErrLayerInUse, err)
		}
		trashName, err := r.d.discard(&r.staging, r.staging.homefd, id, trashPrefix)
		if err == nil {
			r.d.trash.add(r.d, trashName)
		}
		return err
	})
}

// chmod sets the mode of a file or directory beneath the home, never of what a symlink leads to.
func (r *repairer) chmod(path string, mode uint32) error {
	return r.withFile(path, func(fd int) error { return sys.ChmodPath(fd, mode) })
}

// chown gives a file beneath the home to a user.
func (r *repairer) chown(path string, uid uint32) error {
	return r.withFile(path, func(fd int) error { return sys.FchownPath(fd, uid, ^uint32(0)) })
}

func (r *repairer) withFile(path string, f func(fd int) error) error {
	dir, name := filepath.Split(path)
	dirfd, err := sys.OpenDirat(r.staging.homefd, filepath.Clean("./"+dir))
	if err != nil {
		return err
	}
	defer func() { _ = sys.Close(dirfd) }()
	fd, err := sys.OpenPathat(dirfd, name)
	if err != nil {
		return err
	}
	defer func() { _ = sys.Close(fd) }()
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return err
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFDIR {
		return fmt.Errorf("%s: %w", name, sys.ErrNotRegular)
	}
	return f(fd)
}
