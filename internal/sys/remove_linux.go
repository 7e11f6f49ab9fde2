package sys

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	// maxOpenDirs bounds the descriptors that RemoveAllAt holds for nested directories.
	maxOpenDirs = 64
	// removeBatch is how many names of a directory RemoveAllAt holds at a time.
	removeBatch = 4096
)

// RemoveAllAt removes name beneath dirfd with all it holds, without following a
// symlink and without entering another mount: a mount beneath is EXDEV or EBUSY. What
// is gone already is no error. Nesting of any depth takes a bounded number of descriptors.
func RemoveAllAt(dirfd int, name string) error {
	return RemoveAllUntil(dirfd, name, func() error { return nil })
}

// RemoveAllUntil is RemoveAllAt that ends with the error of stop, which it calls before each entry.
func RemoveAllUntil(dirfd int, name string, stop func() error) (err error) {
	if err := unlinkAny(dirfd, name, false); !notEmpty(err) {
		return err
	}
	r := remover{}
	defer func() { err = errors.Join(err, r.close()) }()
	if err := r.enter(dirfd, name); err != nil {
		return ignoreGone(err)
	}
	for len(r.frames) > 0 {
		err := stop()
		if err == nil {
			err = r.step(dirfd)
		}
		if err != nil {
			return fmt.Errorf("remove %s: %w", name, err)
		}
	}
	return nil
}

// remover is a walk through a tree that is being removed; frames are the directories from
// the top to the one at work. All but the deepest few are closed and opened again by "..".
type remover struct {
	frames []removeFrame
	dir    DirReader
}

type removeFrame struct {
	fd       int // -1 while closed
	name     string
	dev, ino uint64
	entries  []removeEntry // read, not removed yet
	// begun and whole say that the directory was read, and to its end.
	begun, whole bool
}

type removeEntry struct {
	name string
	dir  bool
}

// step removes one entry, enters one directory, or leaves an empty one. Top is where the whole tree hangs.
func (r *remover) step(top int) error {
	f := &r.frames[len(r.frames)-1]
	if len(f.entries) == 0 && !f.whole {
		if err := f.read(&r.dir); err != nil {
			return err
		}
	}
	if len(f.entries) == 0 {
		return r.leave(top)
	}
	e := f.entries[len(f.entries)-1]
	f.entries = f.entries[:len(f.entries)-1]
	err := unlinkAny(f.fd, e.name, e.dir)
	if notEmpty(err) {
		return ignoreGone(r.enter(f.fd, e.name))
	}
	return err
}

// read takes the next entries of the directory.
func (f *removeFrame) read(dir *DirReader) error {
	if f.begun {
		if err := dir.Reset(f.fd); err != nil {
			return err
		}
	} else {
		dir.Start(f.fd)
		f.begun = true
	}
	for len(f.entries) < removeBatch {
		name, typ, err := dir.Next()
		if err != nil {
			return err
		}
		if name == nil {
			f.whole = true
			return nil
		}
		f.entries = append(f.entries, removeEntry{string(name), typ == unix.DT_DIR})
	}
	return nil
}

// enter makes the directory name beneath dirfd the one at work.
func (r *remover) enter(dirfd int, name string) error {
	fd, err := openSameMount(dirfd, name)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := Fstat(fd, &st); err != nil {
		return errors.Join(err, Close(fd))
	}
	r.frames = append(r.frames, removeFrame{fd: fd, name: name, dev: st.Dev, ino: st.Ino})
	if old := len(r.frames) - 1 - maxOpenDirs; old >= 0 {
		fd := r.frames[old].fd
		r.frames[old].fd = -1
		return Close(fd)
	}
	return nil
}

// leave removes the directory at work, which is empty, and goes on in the one above.
func (r *remover) leave(top int) error {
	f := r.frames[len(r.frames)-1]
	if len(r.frames) > 1 {
		up := &r.frames[len(r.frames)-2]
		if up.fd < 0 {
			if err := up.reopen(f.fd); err != nil {
				return err
			}
		}
		top = up.fd
	}
	r.frames = r.frames[:len(r.frames)-1]
	if err := Close(f.fd); err != nil {
		return err
	}
	if err := unlinkAny(top, f.name, true); !notEmpty(err) {
		return err
	}
	// Somebody adds entries while we remove: take them too.
	return ignoreGone(r.enter(top, f.name))
}

// reopen opens a closed frame from the directory below.
func (f *removeFrame) reopen(below int) error {
	fd, err := OpenParent(below, f.dev, f.ino)
	if err != nil {
		return fmt.Errorf("directory %s: %w", f.name, err)
	}
	f.fd = fd
	return nil
}

// OpenParent opens the directory above an open one. That it is another inode than this is ESTALE: one of them was
// moved.
func OpenParent(fd int, dev, ino uint64) (int, error) {
	up, err := OpenDirat(fd, "..")
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	err = Fstat(up, &st)
	if err == nil && (st.Dev != dev || st.Ino != ino) {
		err = fmt.Errorf("moved: %w", unix.ESTALE)
	}
	if err != nil {
		return -1, errors.Join(err, Close(up))
	}
	return up, nil
}

func (r *remover) close() (err error) {
	for _, f := range r.frames {
		if f.fd >= 0 {
			err = errors.Join(err, Close(f.fd))
		}
	}
	return err
}

func notEmpty(err error) bool { return err == unix.ENOTEMPTY || err == unix.EEXIST }

func ignoreGone(err error) error {
	if err == unix.ENOENT {
		return nil
	}
	return err
}

// unlinkAny removes a file or an empty directory; dir says that it is probably one. Absence is no error.
func unlinkAny(dirfd int, name string, dir bool) error {
	if dir {
		err := retry(func() error { return unix.Unlinkat(dirfd, name, unix.AT_REMOVEDIR) })
		if err != unix.ENOTDIR {
			return ignoreGone(err)
		}
	}
	err := retry(func() error { return unix.Unlinkat(dirfd, name, 0) })
	if err == unix.EISDIR || err == unix.EPERM {
		err = retry(func() error { return unix.Unlinkat(dirfd, name, unix.AT_REMOVEDIR) })
		if err == unix.ENOTDIR {
			err = unix.EPERM // a file that may not be removed: immutable or append-only
		}
	}
	return ignoreGone(err)
}

// openSameMount opens a directory unless something is mounted on it. Kernels
// before openat2 compare devices, which a bind mount from the same filesystem escapes.
func openSameMount(dirfd int, name string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_XDEV,
	}
	for {
		fd, err := unix.Openat2(dirfd, name, &how)
		switch err {
		case unix.EINTR, unix.EAGAIN:
			continue
		case unix.ENOSYS, unix.EPERM:
			return openSameDevice(dirfd, name)
		}
		return fd, err
	}
}

func openSameDevice(dirfd int, name string) (int, error) {
	fd, err := OpenDirat(dirfd, name)
	if err != nil {
		return -1, err
	}
	var parent, st unix.Stat_t
	if err = errors.Join(Fstat(dirfd, &parent), Fstat(fd, &st)); err == nil && parent.Dev != st.Dev {
		err = unix.EXDEV
	}
	if err != nil {
		return -1, errors.Join(err, Close(fd))
	}
	return fd, nil
}
