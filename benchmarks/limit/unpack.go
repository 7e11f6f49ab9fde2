//go:build linux

package limit

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// directory is an open directory that files are still being made in.
type directory struct {
	fd   int
	refs atomic.Int32
}

func (d *directory) release() error {
	if d.refs.Add(-1) == 0 {
		return unix.Close(d.fd)
	}
	return nil
}

// file is an open file that pieces are still being written to.
type file struct {
	fd   int
	sec  int64
	refs atomic.Int32
}

// job is a small file to make, or a piece of a large one.
type job struct {
	dir      *directory // for a small file
	name     string
	mode     uint32
	uid, gid int
	sec      int64

	large  *file // for a piece
	offset int64

	data  []byte
	chunk *chunk
}

type unpacker struct {
	root    int
	umask   uint32
	dirName string
	dir     *directory
	links   []entry
	dirs    []entry

	batch  []job
	work   chan []job // nil with one thread
	group  sync.WaitGroup
	failed atomic.Pointer[error]
}

// Unpack unpacks a tar into an empty directory. With no workers all is done by the
// calling thread; with some, files are made by them while the caller reads and parses.
func Unpack(dir string, r io.Reader, workers int) error {
	root, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_PATH, 0)
	if err != nil {
		return err
	}
	u := &unpacker{root: root, dirName: "\x00"}
	chunks := 2
	if workers > 0 {
		chunks = 8
		u.work = make(chan []job, workers)
		for range workers {
			u.group.Go(u.worker)
		}
	}
	u.umask, err = umask()
	if err == nil {
		err = u.run(newStream(r, chunks))
	}
	return errors.Join(err, unix.Close(root))
}

// umask reads the process's umask without changing it (Linux 4.7).
func umask() (uint32, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, _ := bytes.Cut(status, []byte("Umask:\t"))
	digits, _, _ := bytes.Cut(rest, []byte("\n"))
	n, err := strconv.ParseUint(string(digits), 8, 32)
	return uint32(n), err
}

func (u *unpacker) worker() {
	for batch := range u.work {
		for i := range batch {
			if err := u.do(&batch[i]); err != nil {
				u.failed.CompareAndSwap(nil, &err)
			}
		}
	}
}

func (u *unpacker) run(s *stream) error {
	err := u.entries(s)
	if u.work != nil {
		u.flush()
		close(u.work)
		u.group.Wait()
		if p := u.failed.Load(); err == nil && p != nil {
			err = *p
		}
	}
	if u.dir != nil {
		err = errors.Join(err, u.dir.release())
	}
	if err != nil {
		return err
	}
	for _, e := range u.links {
		if err := unix.Linkat(u.root, e.link, u.root, e.name, 0); err != nil {
			return err
		}
	}
	for i := len(u.dirs) - 1; i >= 0; i-- {
		if err := times(u.root, u.dirs[i].name, u.dirs[i].sec); err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacker) entries(s *stream) error {
	for {
		var e entry
		if err := s.next(&e); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if err := u.entry(s, &e); err != nil {
			return err
		}
		if p := u.failed.Load(); p != nil {
			return *p
		}
	}
}

func (u *unpacker) entry(s *stream, e *entry) error {
	switch e.kind {
	case '5':
		return u.makeDir(e)
	case '1':
		u.links = append(u.links, *e)
		return nil
	}
	parent, base := "", e.name
	if i := strings.LastIndexByte(e.name, '/'); i >= 0 {
		parent, base = e.name[:i], e.name[i+1:]
	}
	if parent != u.dirName {
		if err := u.enter(parent); err != nil {
			return err
		}
	}
	switch e.kind {
	case '0', 0:
		return u.regular(s, e, base)
	case '2':
		if err := unix.Symlinkat(e.link, u.dir.fd, base); err != nil {
			return err
		}
	default:
		kind := map[byte]uint32{'3': unix.S_IFCHR, '4': unix.S_IFBLK, '6': unix.S_IFIFO}[e.kind]
		if err := unix.Mknodat(u.dir.fd, base, kind|e.mode, e.dev); err != nil {
			return err
		}
	}
	if e.uid != 0 || e.gid != 0 {
		if err := unix.Fchownat(u.dir.fd, base, e.uid, e.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	return times(u.dir.fd, base, e.sec)
}

func times(dirfd int, name string, sec int64) error {
	ts := []unix.Timespec{unix.NsecToTimespec(sec * 1e9), unix.NsecToTimespec(sec * 1e9)}
	return unix.UtimesNanoAt(dirfd, name, ts, unix.AT_SYMLINK_NOFOLLOW)
}

func (u *unpacker) enter(name string) error {
	if u.dir != nil {
		if err := u.dir.release(); err != nil {
			return err
		}
		u.dir = nil
	}
	fd, err := unix.Openat(u.root, "./"+name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	u.dir, u.dirName = &directory{fd: fd}, name
	u.dir.refs.Add(1)
	return nil
}

func (u *unpacker) makeDir(e *entry) error {
	if err := unix.Mkdirat(u.root, e.name, e.mode); err != nil {
		return err
	}
	if e.uid != 0 || e.gid != 0 {
		if err := unix.Fchownat(u.root, e.name, e.uid, e.gid, 0); err != nil {
			return err
		}
	}
	if e.mode&(u.umask|0o7000) != 0 {
		if err := unix.Fchmodat(u.root, e.name, e.mode, 0); err != nil {
			return err
		}
	}
	u.dirs = append(u.dirs, *e)
	return nil
}

// small is the largest file that is made by one job.
const small = chunkSize / 4

func (u *unpacker) regular(s *stream, e *entry, base string) error {
	if e.size > small {
		return u.large(s, e, base)
	}
	data, err := s.need(int(e.size + padding(e.size)))
	if err != nil {
		return err
	}
	j := job{
		dir: u.dir, name: base, mode: e.mode, uid: e.uid, gid: e.gid, sec: e.sec,
		data: data[:e.size], chunk: s.cur,
	}
	return u.add(j)
}

// add does the job, or gives it to the workers: those of one chunk together.
func (u *unpacker) add(j job) error {
	if j.dir != nil {
		j.dir.refs.Add(1)
	}
	j.chunk.hold()
	if u.work == nil {
		return u.do(&j)
	}
	if n := len(u.batch); n > 0 && (u.batch[n-1].chunk != j.chunk || n == 128) {
		u.flush()
	}
	u.batch = append(u.batch, j)
	return nil
}

func (u *unpacker) flush() {
	if len(u.batch) > 0 {
		u.work <- u.batch
		u.batch = make([]job, 0, 128)
	}
}

func (u *unpacker) large(s *stream, e *entry, base string) error {
	fd, err := u.open(u.dir.fd, base, e.mode, e.uid, e.gid)
	if err != nil {
		return err
	}
	f := &file{fd: fd, sec: e.sec}
	f.refs.Add(1)
	for offset := int64(0); offset < e.size; {
		data, err := s.some(int(min(e.size-offset, chunkSize)))
		if err != nil {
			return err
		}
		f.refs.Add(1)
		if err := u.add(job{large: f, offset: offset, data: data, chunk: s.cur}); err != nil {
			return err
		}
		// A chunk given away is not waited for: the next may be read meanwhile.
		u.flush()
		offset += int64(len(data))
	}
	if err := f.release(); err != nil {
		return err
	}
	return s.skip(padding(e.size))
}

func (f *file) release() error {
	if f.refs.Add(-1) == 0 {
		return errors.Join(ftimes(f.fd, f.sec), unix.Close(f.fd))
	}
	return nil
}

func (u *unpacker) open(dirfd int, name string, mode uint32, uid, gid int) (int, error) {
	fd, err := unix.Openat(dirfd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, mode)
	if err != nil {
		return -1, err
	}
	if uid != 0 || gid != 0 {
		if err := unix.Fchown(fd, uid, gid); err != nil {
			return -1, err
		}
	}
	if mode&(u.umask|0o7000) != 0 {
		if err := unix.Fchmod(fd, mode); err != nil {
			return -1, err
		}
	}
	return fd, nil
}

func (u *unpacker) do(j *job) error {
	defer j.chunk.release()
	if j.large != nil {
		_, err := unix.Pwrite(j.large.fd, j.data, j.offset)
		return errors.Join(err, j.large.release())
	}
	fd, err := u.open(j.dir.fd, j.name, j.mode, j.uid, j.gid)
	if err != nil {
		return err
	}
	if len(j.data) > 0 {
		if _, err := unix.Write(fd, j.data); err != nil {
			return err
		}
	}
	if err := ftimes(fd, j.sec); err != nil {
		return err
	}
	if err := unix.Close(fd); err != nil {
		return err
	}
	return j.dir.release()
}

// ftimes sets the times of an open file: utimensat with a null name.
func ftimes(fd int, sec int64) error {
	ts := [2]unix.Timespec{unix.NsecToTimespec(sec * 1e9), unix.NsecToTimespec(sec * 1e9)}
	_, _, errno := unix.RawSyscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
