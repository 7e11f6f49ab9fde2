package sys

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MountError is an error of a mount call.
type MountError struct {
	// Call is the system call.
	Call string
	// Target is where it was to be mounted.
	Target string
	// Data are the options given.
	Data string
	// Err is the errno.
	Err error
	// Text is what the kernel says of it, if anything.
	Text string
}

// Error returns the call, its target, the errno, the kernel's text and the options, shortened.
func (e *MountError) Error() string {
	s := fmt.Sprintf("%s %s: %v", e.Call, e.Target, e.Err)
	if e.Text != "" {
		s += ": " + e.Text
	}
	data := e.Data
	if len(data) > 256 {
		data = data[:200] + "..." + data[len(data)-50:]
	}
	if data != "" {
		s += fmt.Sprintf(" (options %q)", data)
	}
	return s
}

// Unwrap returns the errno.
func (e *MountError) Unwrap() error { return e.Err }

// MaxMountData is the longest option string in bytes that mount(2) takes. It copies one
// page and needs a NUL within; longer data is cut silently (fs/namespace.c, copy_mount_options).
func MaxMountData() int { return os.Getpagesize() - 1 }

// MountOverlay mounts an overlay at target. Data longer than MaxMountData is EMSGSIZE and
// never reaches the kernel, which would cut it and mount other layers than those asked for.
func MountOverlay(target, data string, flags uintptr) error {
	if len(data) > MaxMountData() {
		return &MountError{Call: "mount", Target: target, Data: data, Err: unix.EMSGSIZE}
	}
	if err := unix.Mount("overlay", target, "overlay", flags, data); err != nil {
		return &MountError{Call: "mount", Target: target, Data: data, Err: err}
	}
	return nil
}

// MountOverlayNamed is MountOverlay with data that need not be copied, which is worth it where they are a page.
func MountOverlayNamed(target string, data Name) error {
	if len(data) > MaxMountData()+1 {
		return &MountError{Call: "mount", Target: target, Data: data.String(), Err: unix.EMSGSIZE}
	}
	to, fsType := MakeName(target), MakeName("overlay")
	_, _, errno := unix.Syscall6(unix.SYS_MOUNT, uintptr(unsafe.Pointer(unsafe.SliceData(fsType))), uintptr(unsafe.Pointer(unsafe.SliceData(to))),
		uintptr(unsafe.Pointer(unsafe.SliceData(fsType))), 0, uintptr(unsafe.Pointer(unsafe.SliceData(data))), 0)
	runtime.KeepAlive(to)
	runtime.KeepAlive(fsType)
	runtime.KeepAlive(data)
	if errno != 0 {
		return &MountError{Call: "mount", Target: target, Data: data.String(), Err: errno}
	}
	return nil
}

// MountOverlayFrom is MountOverlay with target, and the names in data, relative to the
// directory dir. It runs on a thread of its own with a working directory of its own
// (unshare CLONE_FS), which is thrown away: the process's working directory never changes.
func MountOverlayFrom(dir, target, data string, flags uintptr) error {
	return OnOwnThreadIn(dir, func() error { return MountOverlay(target, data, flags) })
}

// MountOverlayHere is MountOverlayFrom on a thread that is the caller's own, whose working
// directory it changes. See OnOwnThread.
func MountOverlayHere(dir, target, data string, flags uintptr) error {
	if err := unix.Chdir(dir); err != nil {
		return &MountError{Call: "chdir", Target: dir, Data: data, Err: err}
	}
	return MountOverlay(target, data, flags)
}

// OnOwnThreadIn is OnOwnThread with the directory dir as the thread's working directory.
func OnOwnThreadIn(dir string, f func() error) error {
	return OnOwnThread(func() error {
		if err := unix.Chdir(dir); err != nil {
			return &MountError{Call: "chdir", Target: dir, Err: err}
		}
		return f()
	})
}

// OnOwnThread runs f on a locked thread whose working directory, root and umask are its
// own. The thread ends with f. It is never the process's first thread: that one cannot
// end, and /proc/PID/cwd would show what f did to it.
func OnOwnThread(f func() error) error {
	done := make(chan error, 1)
	go onOwnThread(f, done)
	return <-done
}

func onOwnThread(f func() error, done chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// Locked here, this goroutine keeps the first thread busy: the next one gets another.
		inner := make(chan error, 1)
		go onOwnThread(f, inner)
		err := <-inner
		runtime.UnlockOSThread()
		done <- err
		return
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		runtime.UnlockOSThread()
		done <- fmt.Errorf("unshare CLONE_FS: %w", err)
		return
	}
	done <- f() // ends locked, so that the runtime ends the thread
}

// AsOwner makes the calling thread, which must be one of OnOwnThread, act on files as uid and
// gid with all capabilities that it may have: going over to another user has the kernel drop some.
func AsOwner(uid, gid int) error {
	if _, err := unix.SetfsgidRetGid(gid); err != nil {
		return fmt.Errorf("setfsgid %d: %w", gid, err)
	}
	if _, err := unix.SetfsuidRetUid(uid); err != nil {
		return fmt.Errorf("setfsuid %d: %w", uid, err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	for i := range data {
		data[i].Effective = data[i].Permitted
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

// BindReadOnly shows the directory source at target, read-only.
func BindReadOnly(source, target string) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return &MountError{Call: "bind mount", Target: target, Err: err}
	}
	if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		_ = unix.Unmount(target, unix.MNT_DETACH)
		return &MountError{Call: "read-only remount", Target: target, Err: err}
	}
	return nil
}

// Unmount detaches the mount at target, which is not followed if it is a symlink.
func Unmount(target string) error { return unmount(target, target) }

// UnmountAt is Unmount of name in an open directory, by /proc. Errors name it by its path.
func UnmountAt(dirfd int, name, path string) error { return unmount(ProcPath(dirfd)+"/"+name, path) }

func unmount(target, path string) error {
	if err := retry(func() error { return unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) }); err != nil {
		return &MountError{Call: "unmount", Target: path, Err: err}
	}
	return nil
}
