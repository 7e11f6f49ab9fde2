package sys

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// What a watch tells of a directory. Change is of a name in it; Lost says that nothing more will be told of
// the directory, because it was moved or removed or its filesystem unmounted, or, of no watch, that some was not told.
const (
	WatchChange = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_MODIFY | unix.IN_ATTRIB
	WatchLost   = unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_IGNORED | unix.IN_UNMOUNT | unix.IN_Q_OVERFLOW
)

// OpenWatches returns a descriptor that tells of changes of directories (inotify). What a system call has
// changed is told from when it has returned, whichever process of this kernel made it.
func OpenWatches() (int, error) { return unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK) }

// Watch begins to watch an open directory, O_PATH too, and returns the number of the watch, which is not used
// again. A directory that is watched already keeps its number.
func Watch(watches, dirfd int) (int, error) {
	for {
		wd, err := unix.InotifyAddWatch(watches, ProcPath(dirfd), WatchChange|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_ONLYDIR)
		if err != unix.EINTR {
			return wd, err
		}
	}
}

// Unwatch ends a watch.
func Unwatch(watches, wd int) { _, _ = unix.InotifyRmWatch(watches, uint32(wd)) } // it may be gone with the directory

// ReadWatches calls f with what has been changed since it was called last, in order; name is empty for the directory
// itself. It does not wait.
func ReadWatches(watches int, buf []byte, f func(wd int, mask uint32, name string)) error {
	for {
		n, err := Read(watches, buf)
		if err == unix.EAGAIN {
			return nil
		}
		if err != nil {
			return err
		}
		for data := buf[:n]; len(data) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(data))
			mask := binary.NativeEndian.Uint32(data[4:])
			end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(data[12:]))
			name, _, _ := bytes.Cut(data[unix.SizeofInotifyEvent:end], []byte{0})
			f(int(wd), mask, string(name))
			data = data[end:]
		}
		if len(buf)-n >= unix.SizeofInotifyEvent+unix.NAME_MAX+1 {
			return nil // there was room for one more: there was none (inotify_read)
		}
	}
}
