package overlaytest

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// apply does one operation below root and sets the times of what it touched.
func apply(root string, op Op) error {
	at := filepath.Join(root, op.Path)
	touched := []string{filepath.Dir(at)}
	var err error
	switch op.Verb {
	case "create", "mkdir", "symlink", "mkfifo", "mknod":
		if err = os.RemoveAll(at); err == nil {
			err = applyNew(at, op)
		}
		touched = append(touched, at)
	case "rename":
		to := filepath.Join(root, op.To)
		err = move(at, to)
		touched = append(touched, filepath.Dir(to))
	case "link":
		to := filepath.Join(root, op.To)
		err = link(at, to)
		touched = []string{filepath.Dir(to)}
	case "unlink":
		err = os.Remove(at)
	case "removeall":
		err = os.RemoveAll(at)
	default:
		err = applyChange(at, op)
		touched = []string{at}
	}
	if err != nil {
		return err
	}
	ts := unix.NsecToTimespec(op.Time)
	for _, p := range touched {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("set the time of %s: %w", p, err)
		}
	}
	return nil
}

func applyNew(at string, op Op) error {
	var err error
	switch op.Verb {
	case "create":
		err = writeAt(at, os.O_CREATE|os.O_EXCL, op.N, op.Data)
	case "mkdir":
		err = os.Mkdir(at, 0o700)
	case "symlink":
		return os.Symlink(op.To, at)
	case "mkfifo":
		err = unix.Mkfifo(at, 0o600)
	case "mknod":
		err = unix.Mknod(at, op.Mode, int(op.N))
	}
	if err != nil {
		return err
	}
	return unix.Chmod(at, op.Mode&0o7777)
}

func applyChange(at string, op Op) error {
	switch op.Verb {
	case "write":
		return writeAt(at, 0, op.N, op.Data)
	case "append":
		return writeAt(at, os.O_APPEND, 0, op.Data)
	case "truncate":
		return os.Truncate(at, op.N)
	case "chmod":
		return unix.Chmod(at, op.Mode)
	case "chown":
		return os.Lchown(at, int(op.Mode>>16), int(op.Mode&0xffff))
	case "setxattr":
		return unix.Lsetxattr(at, op.Name, op.Data, 0)
	case "removexattr":
		return unix.Lremovexattr(at, op.Name)
	case "utimes":
		return nil
	}
	return fmt.Errorf("unknown operation %q", op.Verb)
}

func writeAt(at string, flags int, offset int64, data []byte) error {
	f, err := os.OpenFile(at, os.O_WRONLY|flags, 0o600)
	if err != nil {
		return err
	}
	if flags&os.O_APPEND != 0 {
		_, err = f.Write(data)
	} else {
		_, err = f.WriteAt(data, offset)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}

// link makes a hard link. Overlayfs with metacopy says EXDEV of a file without its data
// if the path to where they are is long; opening it for writing brings them up, and
// changes its time.
func link(from, to string) error {
	err := unix.Link(from, to)
	if err != unix.EXDEV {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return err
	}
	f, err := os.OpenFile(from, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, from, []unix.Timespec{st.Mtim, st.Mtim}, 0); err != nil {
		return err
	}
	return unix.Link(from, to)
}

// move renames, or copies and removes where the filesystem cannot.
func move(from, to string) error {
	err := unix.Rename(from, to)
	if err != unix.EXDEV {
		return err
	}
	// The new name may be taken, by a file: a directory is never renamed onto another.
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := copyTree(from, to); err != nil {
		return err
	}
	return os.RemoveAll(from)
}
