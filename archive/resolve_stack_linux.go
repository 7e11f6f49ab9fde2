package archive

import (
	"errors"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// push puts the open directory fd on the stack, which owns it then, in case of an error
// too. Made says that it was made for the current entry.
func (b *builder) push(fd int, name string, made bool) error {
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return errors.Join(inDir(name, err), sys.Close(fd))
	}
	n := &dirNode{name: name, parent: b.top(), fd: fd}
	b.setNode(n, &st)
	n.hash = b.names.hash(n.parent.hash, name)
	n.made = made || n.parent.made || b.names.has(n.hash, nameMade)
	b.stack = append(b.stack, n)
	if !made {
		n.acl = hasDefaultACL(fd)
		if b.euid != 0 && st.Uid == b.euid && n.mode&0o700 != 0o700 {
			if err := sys.Fchmod(fd, n.mode|0o700); err != nil {
				return inDir(name, err)
			}
			n.lateMode = true
		}
	}
	return b.limitOpen()
}

// setNode takes over what the kernel says of the directory.
func (b *builder) setNode(n *dirNode, st *unix.Stat_t) {
	n.dev, n.ino = st.Dev, st.Ino
	n.mtime, n.mode = st.Mtim, st.Mode&0o7777
	// A filesystem with group semantics of BSD, or a set-group-id directory, gives new
	// entries the directory's group. Where that is ours it makes no difference.
	n.ownGroup = st.Gid == b.egid
}

// limitOpen closes the handles nearest to the root when there are too many.
func (b *builder) limitOpen() error {
	for len(b.stack)-b.firstOpen > maxOpenDirs {
		n := b.stack[b.firstOpen]
		// What merges beneath must be known before it can't be looked up.
		if _, err := b.view(b.stack[b.firstOpen+1]); err != nil {
			return err
		}
		if err := b.leave(n); err != nil {
			return err
		}
		b.firstOpen++
	}
	return nil
}

// popTo leaves the directories above the first depth ones beneath the root. All of them are closed, also
// if one does not get its times or mode.
func (b *builder) popTo(depth int) error {
	if depth > 0 && depth < b.firstOpen {
		if err := b.reopen(depth); err != nil {
			return err
		}
	}
	var err error
	for len(b.stack)-1 > depth {
		n := b.top()
		b.stack = b.stack[:len(b.stack)-1]
		if n.fd >= 0 {
			err = errors.Join(err, b.leave(n))
		}
	}
	if depth == 0 {
		b.firstOpen = 1
	}
	return err
}

// reopen opens again the closed directory at depth, which will be the top: up from the first
// open one or down from the root, whichever is nearer. It must be the one it was.
func (b *builder) reopen(depth int) error {
	n := b.stack[depth]
	var fd int
	var err error
	if b.firstOpen-depth < depth {
		fd, err = b.climb(depth)
	} else {
		fd, err = b.openAgain(n)
	}
	if err != nil {
		return inDir(n.name, err)
	}
	n.fd = fd
	b.firstOpen = depth
	return nil
}

// climb reaches the directory at depth by "..".
func (b *builder) climb(depth int) (int, error) {
	fd, owned := b.stack[b.firstOpen].fd, false
	for i := b.firstOpen - 1; i >= depth; i-- {
		up, err := sys.OpenDirat(fd, "..")
		if owned {
			err = errors.Join(err, sys.Close(fd))
		}
		if err != nil {
			return -1, err
		}
		fd, owned = up, true
		if err := b.stack[i].is(fd); err != nil {
			return -1, errors.Join(err, sys.Close(fd))
		}
	}
	return fd, nil
}

// openAgain opens a second handle of a directory on the stack, from the root.
func (b *builder) openAgain(n *dirNode) (int, error) {
	var way []*dirNode
	for ; n.parent != nil; n = n.parent {
		way = append(way, n)
	}
	fd, owned := n.fd, false
	for i := len(way) - 1; i >= 0; i-- {
		next, err := sys.OpenDirat(fd, way[i].name)
		if owned {
			err = errors.Join(err, sys.Close(fd))
		}
		if err != nil {
			return -1, err
		}
		fd, owned = next, true
		if err := way[i].is(fd); err != nil {
			return -1, errors.Join(err, sys.Close(fd))
		}
	}
	return fd, nil
}

// is checks that fd is the directory that n was.
func (n *dirNode) is(fd int) error {
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Dev != n.dev || st.Ino != n.ino {
		return ErrChanged
	}
	return nil
}

// touch notes that the directory's times are about to change.
func (b *builder) touch(n *dirNode) {
	n.dirty = true
	if b.opts.Format == Merged {
		b.keep(n)
	}
}

// leave gives the directory its final times and mode, and closes it.
func (b *builder) leave(n *dirNode) error {
	err := b.settle(n)
	if n.parent != nil {
		b.dropView(n)
	}
	err = errors.Join(err, sys.Close(n.fd))
	n.fd = -1
	return err
}

// settle gives the directory its final times and mode.
func (b *builder) settle(n *dirNode) error {
	if n.lateMode {
		n.lateMode = false
		if err := sys.Fchmod(n.fd, n.mode); err != nil {
			return inDir(n.name, err)
		}
	}
	if !n.dirty {
		return nil
	}
	n.dirty = false
	times := [2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, n.mtime}
	if err := sys.Futimens(n.fd, &times); err != nil {
		return inDir(n.name, err)
	}
	return nil
}
