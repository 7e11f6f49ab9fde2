package quota

import (
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// maxID is the last project id; 2^32-1 means "no id" to the kernel.
const maxID = math.MaxUint32 - 1

// claimTries bounds how often claim starts over because another process took the
// same id in the same moment. Each time one of the two has usually moved on.
const claimTries = 1000

// claim gives an open, empty directory a project that nothing else on the filesystem
// has, and returns its id. On an error the directory is as it was.
func (c *Control) claim(k kernel, old fsxattr) (uint32, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for range claimTries {
		id, err := c.free(k)
		if err != nil {
			return 0, err
		}
		x := old
		x.projid, x.xflags = id, old.xflags|xflagProjinherit
		if err := setXattr(k.fd, x); err != nil {
			return 0, err
		}
		// Whoever takes an id first makes its inode count one, then looks. Of two that
		// did so at once, the kernel shows at least the later one both inodes.
		q, err := k.get(id)
		if err == nil && q.inoCount == 1 && !q.limited() {
			return id, nil
		}
		if err := errors.Join(err, setXattr(k.fd, old)); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("no project id could be claimed in %d tries: %w", claimTries, unix.EAGAIN)
}

// limited reports whether a project has a limit.
func (q *diskQuota) limited() bool { return q.blkHard|q.blkSoft|q.inoHard|q.inoSoft != 0 }

// free returns an id that no inode and no limit on the filesystem has, and that no
// administrator has noted: one whose limits Clear lifted, one from nextID on, or, when
// those are all in use, any above the home's.
func (c *Control) free(k kernel) (uint32, error) {
	if id, err := c.freeCleared(k); id != 0 || err != nil {
		return id, err
	}
	if c.base >= maxID-1 {
		return 0, fmt.Errorf("above the home's project %d there is no id for layers: %w", c.base, unix.ENOSPC)
	}
	first := c.firstID()
	id, err := c.freeFrom(k, max(c.nextID, first))
	if id == 0 && err == nil {
		id, err = c.freeFrom(k, first)
	}
	for next := first; id == 0 && err == nil; next++ {
		if next > maxID {
			return 0, fmt.Errorf("all project ids from %d on are in use: %w", first, unix.ENOSPC)
		}
		var used bool
		if used, err = c.inUse(k, next); !used {
			id = next
		}
	}
	if err == nil {
		c.nextID = min(id, maxID-1) + 1
	}
	return id, err
}

// homelessID is where the ids of layers begin whose home has no project of its own. Docker counts up from 2 in such a home, and
// takes what it comes to without asking whether another home of the filesystem has it.
const homelessID = 1 << 20

// firstID returns the lowest id for layers.
func (c *Control) firstID() uint32 {
	if c.base == 0 {
		return homelessID
	}
	return c.base + 2 // the one before is Docker's, which sets its size limit to 0 whenever it starts
}

// freeFrom returns a free id at or above start, 0 if it came upon none. Layers have ids
// in a row, so it leaps in growing steps until one is free and halves the way back: some
// thirty questions where 10,000 are in use. Holes it leapt over are for other times.
func (c *Control) freeFrom(k kernel, start uint32) (uint32, error) {
	last, id := uint64(start)-1, uint64(start) // last is in use, or the one before start
	for step := uint64(1); ; step *= 2 {
		if id > maxID {
			return 0, nil
		}
		used, err := c.inUse(k, uint32(id))
		if err != nil {
			return 0, err
		}
		if !used {
			break
		}
		last, id = id, id+step
	}
	for id-last > 1 {
		middle := (last + id) / 2
		used, err := c.inUse(k, uint32(middle))
		if err != nil {
			return 0, err
		}
		if used {
			last = middle
		} else {
			id = middle
		}
	}
	return uint32(id), nil
}

// freeCleared returns an id that Clear left and whose tree is gone by now, or 0. It
// looks at a few only; those still in use get in line again.
func (c *Control) freeCleared(k kernel) (uint32, error) {
	for range min(len(c.cleared), 4) {
		id := c.cleared[0]
		c.cleared = c.cleared[1:]
		used, err := c.inUse(k, id)
		if err != nil {
			return 0, err
		}
		if !used {
			return id, nil
		}
		c.cleared = append(c.cleared, id)
	}
	return 0, nil
}

// inUse reports whether the filesystem has an inode or a limit with the id, or an
// administrator has a name for it.
func (c *Control) inUse(k kernel, id uint32) (bool, error) {
	if c.noted[id] {
		return true, nil
	}
	next, err := k.next(id)
	if noneLeft(err) {
		return false, nil
	}
	return next == id, err
}
