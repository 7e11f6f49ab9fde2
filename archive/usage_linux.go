package archive

import (
	"context"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// inode names a file of a machine.
type inode struct{ dev, ino uint64 }

// Usage counts the tree at dir, a trusted host path: Stats.Size is the length in bytes of
// everything but directories, symlinks as long as their target, hard links once;
// Stats.Entries is the number of names. Whiteouts and devices have no length. It is what
// Pack and Unpack count, not the blocks used on disk.
//
// A few goroutines share the work; they are gone when it returns. Errors are *EntryError with the
// name of the file, relative to dir.
func Usage(ctx context.Context, dir string) (Stats, error) {
	fd, err := sys.OpenRoot(dir)
	if err != nil {
		return Stats{}, &EntryError{Op: "usage", Name: ".", Err: err}
	}
	var root nameList
	if err := root.read(new(sys.DirReader), fd, false, ctx.Err); err != nil {
		_ = sys.Close(fd)
		return Stats{}, &EntryError{Op: "usage", Name: ".", Err: err}
	}
	u := usage{ctx: ctx, tasks: make(chan usageTask), links: make(map[inode]uint32)}
	u.open.Add(1)
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), maxUsageWorkers) {
		workers.Go(u.work)
	}
	u.tasks <- usageTask{fd: fd, names: root}
	workers.Wait()
	return u.stats, u.err
}

// maxUsageWorkers is the number of goroutines that still gain something: the kernel's locks in
// a directory are shared by all.
const maxUsageWorkers = 4

// usage is one run of Usage.
type usage struct {
	ctx context.Context
	// tasks hands work to who has none. It is closed when all is done.
	tasks chan usageTask
	// open is the number of tasks that are handed out or under way; hungry of the workers that wait.
	open, hungry atomic.Int32
	failed       atomic.Bool

	mu    sync.Mutex // protects what follows
	stats Stats
	err   error
	// links are the files with several names that were counted: how many names are still to come.
	links map[inode]uint32
}

// usageTask is a directory, or some of its names, and all beneath.
type usageTask struct {
	fd    int
	names nameList
	// path names the directory, with a trailing slash.
	path string
}

// usageWorker is one goroutine of it.
type usageWorker struct {
	*usage
	walk  walk
	stats Stats
	// path are the names of the directories that the walk is in, the first that of its task.
	path []string
}

func (u *usage) work() {
	w := usageWorker{usage: u}
	w.walk.stop = u.ctx.Err
	for {
		u.hungry.Add(1)
		task, ok := <-u.tasks
		u.hungry.Add(-1)
		if !ok {
			break
		}
		if name, err := w.do(task); err != nil {
			u.fail(&EntryError{Op: "usage", Name: strings.Join(w.path, "") + name, Err: err})
		}
		w.walk.close()
		if u.open.Add(-1) == 0 {
			close(u.tasks)
		}
	}
	u.mu.Lock()
	u.stats.Entries += w.stats.Entries
	u.stats.Size += w.stats.Size
	u.mu.Unlock()
}

// fail keeps the first error, and ends all workers.
func (u *usage) fail(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.err == nil {
		u.err = err
	}
	u.failed.Store(true)
}

// do counts a task. The name is that of the entry at which an error came.
func (w *usageWorker) do(task usageTask) (name string, err error) {
	d, err := w.walk.enter(task.fd)
	if err != nil {
		return "", err
	}
	d.nameList = task.names
	w.path = append(w.path[:0], task.path)
	for d := w.walk.top(); d != nil && !w.failed.Load(); d = w.walk.top() {
		if err := w.walk.more(d); err != nil {
			return "", err
		}
		name, typ := d.take()
		if name == nil {
			if err := w.leave(); err != nil {
				return "", err
			}
			continue
		}
		if err := w.entry(d.fd, name, typ); err != nil {
			return name.String(), err
		}
	}
	return "", nil
}

func (w *usageWorker) leave() error {
	w.path = w.path[:len(w.path)-1]
	return w.walk.pop()
}

// entry counts one name; a directory is gone down into.
func (w *usageWorker) entry(dirfd int, name sys.Name, typ uint8) error {
	if w.hungry.Load() > 0 {
		w.share()
	}
	if w.stats.Entries++; w.stats.Entries%256 == 0 || typ == unix.DT_DIR {
		if err := w.ctx.Err(); err != nil {
			return err
		}
	}
	if typ != unix.DT_DIR {
		var st sys.Stat
		if err := sys.StatName(dirfd, name, &st); err != nil {
			return err
		}
		if st.Type() != unix.S_IFDIR {
			w.count(&st)
			return nil
		}
	}
	fd, err := sys.OpenName(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return replaced(err)
	}
	w.path = append(w.path, name.String()+"/")
	return w.walk.push(fd, false)
}

// share gives half of what is left in the uppermost directory to a worker that waits. That there is
// none left to wait, or nothing to share, is fine.
func (w *usageWorker) share() {
	for i, d := range w.walk.dirs {
		left := len(d.names) - d.next
		if left < 2 || d.fd < 0 {
			continue
		}
		fd, err := unix.FcntlInt(uintptr(d.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return
		}
		task := usageTask{fd: fd, path: strings.Join(w.path[:i+1], "")}
		keep := d.next + left/2
		for _, n := range d.names[keep:] {
			name := d.at(n)
			task.names.add(name[:len(name)-1], n.typ)
		}
		w.open.Add(1)
		select {
		case w.tasks <- task:
			d.names = d.names[:keep]
		default:
			w.open.Add(-1)
			_ = sys.Close(fd) // read only: nothing can be lost
		}
		return
	}
}

func (w *usageWorker) count(st *sys.Stat) {
	if st.Type() == unix.S_IFCHR || st.Type() == unix.S_IFBLK {
		return
	}
	if st.Nlink > 1 && w.known(st) {
		return
	}
	w.stats.Size += st.Size
}

// known says whether a file with several names was counted by another.
func (u *usage) known(st *sys.Stat) bool {
	id := inode{st.Dev, st.Ino}
	u.mu.Lock()
	defer u.mu.Unlock()
	left, again := u.links[id]
	if !again {
		u.links[id] = st.Nlink - 1
		return false
	}
	if left <= 1 {
		delete(u.links, id)
	} else {
		u.links[id] = left - 1
	}
	return true
}
