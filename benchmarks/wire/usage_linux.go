package wire

import (
	"bytes"
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// usage is the state of the process's counters before a call.
type usage struct {
	self, children unix.Rusage
}

func startUsage() (*usage, error) {
	// "5" resets the peak of the resident set to its present size (Linux 4.0, proc(5)).
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		return nil, err
	}
	u := &usage{}
	return u, errors.Join(unix.Getrusage(unix.RUSAGE_SELF, &u.self), unix.Getrusage(unix.RUSAGE_CHILDREN, &u.children))
}

func (u *usage) stop(res *Response) error {
	var self, children unix.Rusage
	if err := errors.Join(unix.Getrusage(unix.RUSAGE_SELF, &self), unix.Getrusage(unix.RUSAGE_CHILDREN, &children)); err != nil {
		return err
	}
	inChildren := cpu(&children) - cpu(&u.children)
	res.CPU = cpu(&self) - cpu(&u.self) + inChildren
	peak, err := highWater()
	if err != nil {
		return err
	}
	res.Peak = peak
	if inChildren > 0 {
		res.Peak += int64(children.Maxrss) << 10
	}
	return nil
}

func cpu(u *unix.Rusage) int64 { return u.Utime.Nano() + u.Stime.Nano() }

// highWater returns the largest resident set since it was reset.
func highWater() (int64, error) {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, ok := bytes.Cut(data, []byte("VmHWM:"))
	if !ok {
		return 0, errors.New("no VmHWM in /proc/self/status")
	}
	n, err := strconv.ParseInt(string(bytes.Fields(rest)[0]), 10, 64)
	return n << 10, err
}

func syncfs(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(fd), unix.Close(fd))
}
