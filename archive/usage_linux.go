package archive

import (
	"context"
	"errors"

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
// Errors are *EntryError with the name of the file, relative to dir.
func Usage(ctx context.Context, dir string) (Stats, error) {
	fd, err := sys.OpenRoot(dir)
	if err != nil {
		return Stats{}, &EntryError{Op: "usage", Name: ".", Err: err}
	}
	u := usage{ctx: ctx, links: make(map[inode]uint32)}
	defer u.walk.close()
	if err := u.run(fd); err != nil {
		return Stats{}, &EntryError{Op: "usage", Name: u.where(), Err: err}
	}
	return u.stats, nil
}

// usage is one run of Usage.
type usage struct {
	ctx   context.Context
	walk  walk
	stats Stats
	// links are the files with several names that were counted: how many names are still to come.
	links map[inode]uint32
	// name is the entry at hand, for an error; path are the directories above it.
	name string
	path []string
}

func (u *usage) run(root int) error {
	if err := u.walk.push(root, false); err != nil {
		return err
	}
	for {
		d := u.walk.top()
		if d == nil {
			return nil
		}
		name, typ := d.take()
		if name == nil {
			if err := u.walk.pop(); err != nil {
				return err
			}
			if len(u.path) > 0 {
				u.path = u.path[:len(u.path)-1]
			}
			if err := u.ctx.Err(); err != nil {
				return err
			}
			continue
		}
		if err := u.entry(d.fd, name, typ); err != nil {
			u.name = name.String()
			return err
		}
	}
}

// entry counts one name; a directory is gone down into.
func (u *usage) entry(dirfd int, name sys.Name, typ uint8) error {
	u.stats.Entries++
	if typ != unix.DT_DIR {
		var st sys.Stat
		if err := sys.StatName(dirfd, name, &st); err != nil {
			return err
		}
		if st.Type() != unix.S_IFDIR {
			u.count(&st)
			return nil
		}
	}
	fd, err := sys.OpenName(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			err = errors.Join(ErrChanged, err)
		}
		return err
	}
	if err := u.walk.push(fd, false); err != nil {
		return err
	}
	u.path = append(u.path, name.String())
	return nil
}

func (u *usage) count(st *sys.Stat) {
	if st.Type() == unix.S_IFCHR || st.Type() == unix.S_IFBLK {
		return
	}
	if st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if left, again := u.links[id]; again {
			if left <= 1 {
				delete(u.links, id)
			} else {
				u.links[id] = left - 1
			}
			return
		}
		u.links[id] = st.Nlink - 1
	}
	u.stats.Size += st.Size
}

func (u *usage) where() string {
	name := ""
	for _, p := range u.path {
		name += p + "/"
	}
	return name + u.name
}
