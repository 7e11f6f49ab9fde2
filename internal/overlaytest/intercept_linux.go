package overlaytest

import (
	"fmt"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Changing are the system calls that change something on disk or in the mount table.
func Changing() map[uint32]string {
	return map[uint32]string{
		unix.SYS_MKDIRAT: "mkdirat", unix.SYS_MKNODAT: "mknodat", unix.SYS_SYMLINKAT: "symlinkat", unix.SYS_LINKAT: "linkat",
		unix.SYS_UNLINKAT: "unlinkat", unix.SYS_RENAMEAT: "renameat", unix.SYS_RENAMEAT2: "renameat2",
		unix.SYS_FCHMOD: "fchmod", unix.SYS_FCHMODAT: "fchmodat", unix.SYS_FCHOWN: "fchown", unix.SYS_FCHOWNAT: "fchownat",
		unix.SYS_UTIMENSAT: "utimensat", unix.SYS_FTRUNCATE: "ftruncate", unix.SYS_WRITE: "write", unix.SYS_PWRITE64: "pwrite64",
		unix.SYS_FALLOCATE: "fallocate", unix.SYS_COPY_FILE_RANGE: "copy_file_range",
		unix.SYS_SETXATTR: "setxattr", unix.SYS_LSETXATTR: "lsetxattr", unix.SYS_FSETXATTR: "fsetxattr",
		unix.SYS_REMOVEXATTR: "removexattr", unix.SYS_LREMOVEXATTR: "lremovexattr", unix.SYS_FREMOVEXATTR: "fremovexattr",
		unix.SYS_MOUNT: "mount", unix.SYS_UMOUNT2: "umount2", unix.SYS_FSMOUNT: "fsmount", unix.SYS_FSCONFIG: "fsconfig",
		unix.SYS_MOVE_MOUNT: "move_mount", unix.SYS_MOUNT_SETATTR: "mount_setattr",
		unix.SYS_FSYNC: "fsync", unix.SYS_FDATASYNC: "fdatasync", unix.SYS_SYNCFS: "syncfs",
	}
}

// Failing are the system calls that can fail on a full, broken or exhausted machine: those
// of Changing and those that open, look and read.
func Failing() map[uint32]string {
	calls := Changing()
	for nr, name := range map[uint32]string{
		unix.SYS_OPENAT: "openat", unix.SYS_OPENAT2: "openat2", unix.SYS_READ: "read", unix.SYS_PREAD64: "pread64",
		unix.SYS_GETDENTS64: "getdents64", unix.SYS_FSTAT: "fstat", unix.SYS_STATX: "statx", unix.SYS_READLINKAT: "readlinkat",
		unix.SYS_FLOCK: "flock", unix.SYS_FSTATFS: "fstatfs", unix.SYS_STATFS: "statfs", unix.SYS_FSOPEN: "fsopen",
		unix.SYS_OPEN_TREE: "open_tree", unix.SYS_GETXATTR: "getxattr", unix.SYS_LGETXATTR: "lgetxattr",
		unix.SYS_FGETXATTR: "fgetxattr", unix.SYS_FLISTXATTR: "flistxattr", unix.SYS_LISTXATTR: "listxattr",
	} {
		calls[nr] = name
	}
	for _, nr := range statCalls() {
		calls[nr] = "fstatat"
	}
	return calls
}

// Intercept has decide asked before each of calls, whichever thread of this process makes it:
// 0 lets it happen, another errno is returned in its place. It cannot be undone, so that it is for processes
// that a test starts. It needs "seccomp". decide must not make such a call, nor wait for one who does.
//
// It is asked of calls made by Go code only. The runtime's own calls, and those of the C library in a thread that
// is being started (malloc opens /sys/devices/system/cpu/online), are made without leave to be stopped meanwhile:
// if the collector waits for such a thread, and it for an answer, there is nobody left to give that.
func Intercept(t testing.TB, calls map[uint32]string, decide func(call string) unix.Errno) {
	t.Helper()
	at, err := syscallAddress()
	if err != nil {
		t.Fatalf("seccomp: where system calls are made: %v", err)
	}
	const all = unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH
	fd, err := listen(filterFor(calls, at), all)
	for err == unix.ESRCH { // the thread of syscallAddress has its own filter until it is gone
		time.Sleep(time.Millisecond)
		fd, err = listen(filterFor(calls, at), all)
	}
	if err != nil {
		t.Fatalf("seccomp: %v", err)
	}
	go func() {
		runtime.LockOSThread()
		for {
			answer(fd, func(n notification) unix.Errno { return decide(calls[uint32(n.nr)]) })
		}
	}()
}

// answer waits for one call and lets it happen, or fail if decide says so.
func answer(fd uintptr, decide func(n notification) unix.Errno) {
	var n notification
	if errno := ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); errno != 0 {
		return // EINTR, or ENOENT: the caller has been killed
	}
	r := response{id: n.id}
	if errno := decide(n); errno == 0 {
		r.flags = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
	} else {
		r.err = -int32(errno)
	}
	// A signal interrupts this, too, if another thread has the listener's lock (seccomp_notify_send,
	// mutex_lock_interruptible), and who asked would wait for ever.
	for ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r)) == unix.EINTR {
	}
}

// syscallAddress returns where Go code makes its system calls: there is one place. It has a thread, which ends then, make one.
func syscallAddress() (uint64, error) {
	type listener struct {
		fd  uintptr
		err error
	}
	listening, done := make(chan listener), make(chan struct{})
	const nowhere = 0xfedcba // a number of a descriptor that none has
	go onOtherThread(func() {
		fd, err := listen([]unix.SockFilter{
			load(nrAt),
			jump(unix.SYS_FSYNC, 0, 2),
			load(firstAt),
			jump(nowhere, 1, 0),
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
		}, 0)
		listening <- listener{fd, err}
		if err == nil {
			_ = unix.Fsync(nowhere)
		}
		close(done)
	})
	l := <-listening
	if l.err != nil {
		return 0, l.err
	}
	var at uint64
	for at == 0 {
		answer(l.fd, func(n notification) unix.Errno { at = n.ip; return 0 })
	}
	<-done
	return at, unix.Close(int(l.fd))
}

// onOtherThread runs f on a thread that is not the process's first, which cannot end, and ends it.
func onOtherThread(f func()) {
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	if unix.Gettid() != unix.Getpid() {
		f()
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		onOtherThread(f)
	}()
	<-done
	runtime.UnlockOSThread()
}

// notification is struct seccomp_notif, response is struct seccomp_notif_resp.
type notification struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

type response struct {
	id    uint64
	value int64
	err   int32
	flags uint32
}

func ioctl(fd, request uintptr, arg unsafe.Pointer) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(arg))
	return errno
}

// Offsets in seccomp_data, on a processor with the lower half first: the number of the call, the halves of the address
// that it is made at, and the lower half of its first argument.
const nrAt, addressAt, firstAt = 0, 8, 16

// filterFor has the listener asked of calls made at an address.
func filterFor(calls map[uint32]string, address uint64) []unix.SockFilter {
	filter := []unix.SockFilter{
		load(addressAt),
		jump(uint32(address), 0, uint8(len(calls)+3)),
		load(addressAt + 4),
		jump(uint32(address>>32), 0, uint8(len(calls)+1)),
		load(nrAt),
	}
	left := len(calls)
	for nr := range calls {
		filter = append(filter, jump(nr, uint8(left), 0))
		left--
	}
	return append(filter,
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
}

// listen installs a filter and returns its listener. A signal, as the runtime sends them to itself, does not
// make an intercepted call start again (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, Linux 5.19).
func listen(filter []unix.SockFilter, flags uintptr) (uintptr, error) {
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	flags |= unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return 0, errno
	}
	return fd, nil
}

func load(at uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
}

// jump skips yes instructions if what was loaded is k, else no.
func jump(k uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: yes, Jf: no, K: k}
}

// probeSeccomp asks whether the kernel has what Intercept needs.
func probeSeccomp() error {
	const getActionAvail = 2 // SECCOMP_GET_ACTION_AVAIL
	action := uint32(unix.SECCOMP_RET_USER_NOTIF)
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, getActionAvail, 0, uintptr(unsafe.Pointer(&action))); errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	// A flag that is known gets as far as the missing program.
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, 0); errno != unix.EFAULT {
		return fmt.Errorf("seccomp listener: %w", errno)
	}
	return nil
}
