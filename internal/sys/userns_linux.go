package sys

import (
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// NewUserNS returns a descriptor of a new user namespace with these maps, in which no process
// is. The kernel makes one only together with a process: that is a child which stops, traced, when it
// is to run its first instruction, and is killed there. None of the program's code runs in it.
func NewUserNS(uids, gids []syscall.SysProcIDMap) (fd int, err error) {
	fd = -1
	done := make(chan error, 1)
	go func() {
		// The thread is the child's tracer; killed with it, should this process die, is the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var err error
		fd, err = newUserNS(uids, gids)
		done <- err
	}()
	err = <-done
	return fd, err
}

func newUserNS(uids, gids []syscall.SysProcIDMap) (fd int, err error) {
	pidfd := -1
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"overlay2-userns"}, &syscall.ProcAttr{ //nolint:forbidigo // x/sys has none
		Sys: &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWUSER, UidMappings: uids, GidMappings: gids,
			Ptrace: true, Pdeathsig: syscall.SIGKILL, PidFD: &pidfd,
		},
	})
	if err != nil {
		return -1, fmt.Errorf("make a user namespace: %w", err)
	}
	defer func() {
		err = errors.Join(err, endChild(pid, pidfd))
	}()
	err = retry(func() error {
		fd, err = unix.Open("/proc/"+strconv.Itoa(pid)+"/ns/user", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("open a user namespace: %w", err)
	}
	if pidfd >= 0 {
		// Was it that child's, or has somebody reaped it and another process its number?
		if err := unix.PidfdSendSignal(pidfd, 0, nil, 0); err != nil {
			return -1, errors.Join(fmt.Errorf("make a user namespace: %w", err), Close(fd))
		}
	}
	return fd, nil
}

// endChild kills and reaps a child. A caller who waits for all children may have done the latter.
func endChild(pid, pidfd int) error {
	var err error
	if pidfd >= 0 {
		err = errors.Join(unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0), Close(pidfd))
	} else {
		err = unix.Kill(pid, unix.SIGKILL)
	}
	if errors.Is(err, unix.ESRCH) {
		err = nil
	}
	waited := retry(func() error {
		var status unix.WaitStatus
		for {
			// A stop may be reported before the end is.
			if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil || status.Exited() || status.Signaled() {
				return err
			}
		}
	})
	if waited == unix.ECHILD {
		waited = nil
	}
	return errors.Join(err, waited)
}
