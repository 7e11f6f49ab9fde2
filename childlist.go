//go:build linux

package overlay2

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// A layer lists its children, so that Remove need not read the chains of all layers to know that there are none:
//
//	children/LINK.ID -> "-"     a child made by this driver, by its short name and ID
//	listed -> STATE             the seal: while the layer is in this state, all its children are in the list
//
// An entry is made before its child appears and goes after it has, and each attempt to make a child has an entry of
// its own. So the list may hold too much, after a crash or because Docker removed a layer, and each entry is
// looked at; but it never lacks a child that this driver made. Docker, which knows nothing of the list, writes the
// file committed of the parent anew for each child that it makes (since 19.03.3, moby#39780): its inode and a time
// are the state, with the inode of the list. Of a layer without that file the state is "-." and the inode and time of birth of
// diff, which is there from the start. So the seal breaks by itself when Docker makes a child, and when the home is copied, or
// a layer put back as it was before it had a child. A layer without a seal that holds
// has the children that a look at all layers finds.
const (
	childrenName = "children"
	listedName   = "listed"
)

const (
	// unparented begins the state of a layer without the file committed.
	unparented = "-"
	// markSec is the second of modification of each file committed that this driver makes (in 2010); the nanoseconds are random. Docker
	// 19.03 writes to the file in place, at times twice within one tick of the clock that inodes have their times from
	// (10 ms; finer since 6.13, commit ffb6cf19e063), which its time of change does not show. This one it does.
	markSec = 1279351122
)

// childEntry returns the name of a child in the list of its parent, and what the entry holds: the ID if it does not
// fit into the name.
func childEntry(link, id string) (name, target string) {
	if name = link + "." + id; len(name) <= maxIDLen {
		return name, noParent
	}
	return link, id
}

// childID returns the ID of the child that an entry of the open list is about, "" if it is none of ours.
func childID(listfd int, name string) string {
	link, id, whole := strings.Cut(name, ".")
	if !whole {
		id, _ = sys.Readlinkat(listfd, name) // "" like any other garbage
	}
	if !linkid.Valid(link) || checkID(id) != nil {
		return ""
	}
	return id
}

// openList opens the list of the layer's children. It returns -1 if there is none, and odd if what lies
// there is no directory.
func (l *layer) openList() (fd int, odd bool, err error) {
	fd, err = sys.OpenDirat(l.fd, childrenName)
	switch err {
	case nil:
		return fd, false, nil
	case unix.ENOENT:
		return -1, false, nil
	case unix.ENOTDIR, unix.ELOOP:
		return -1, true, nil
	}
	return -1, false, fmt.Errorf("%s: %w", childrenName, err)
}

// makeList opens the list of the layer's children, and makes it if there is none. It returns -1 if what lies
// there is no directory.
func (l *layer) makeList() (fd int, err error) {
	fd, odd, err := l.openList()
	if fd >= 0 || odd || err != nil {
		return fd, err
	}
	if err := sys.Mkdirat(l.fd, childrenName, 0o700); err != nil && err != unix.EEXIST {
		return -1, fmt.Errorf("%s: %w", childrenName, err)
	}
	fd, _, err = l.openList()
	return fd, err
}

// committedState returns the state of the layer's file committed, which changes when Docker makes a child.
func (l *layer) committedState() (string, error) {
	state, _, err := l.committedStateAt(unix.Timespec{})
	return state, err
}

// committedStateAt also says whether the state is settled, so that it is sure to change: a file that was changed in this
// moment can be changed again without a trace. Now is the time, before the call, of the clock that inodes have theirs from
// (CLOCK_REALTIME_COARSE): whatever changes the file later has a later one.
func (l *layer) committedStateAt(now unix.Timespec) (state string, settled bool, err error) {
	var st unix.Stat_t
	switch err := sys.Fstatat(l.fd, committedName, &st); err {
	case nil:
	case unix.ENOENT:
		return unparented, true, nil
	default:
		return "", false, fmt.Errorf("%s: %w", committedName, err)
	}
	if st.Mtim.Sec == markSec {
		return markState(st.Ino, st.Mtim), true, nil
	}
	settled = st.Ctim.Sec < now.Sec
	if st.Ctim.Nsec != 0 { // else the filesystem may know seconds only
		settled = st.Ctim.Nano() < now.Nano()
	}
	return fmt.Sprintf("%d.%d.%d", st.Ino, st.Ctim.Sec, st.Ctim.Nsec), settled, nil
}

// markState is the state of a file committed that this driver has made.
func markState(ino uint64, mark unix.Timespec) string {
	return fmt.Sprintf("%d.%d.%d", ino, mark.Sec, mark.Nsec)
}

// childless is the state of a layer without the file committed, that has this diff.
func childless(diff sys.Ident) string { return unparented + "." + diff.Lasting() }

// listState returns the state that a seal must name to hold, "" if none can: that of committed with that of the
// list, which is -1 if there is none.
func (l *layer) listState(committed string, listfd int) (string, error) {
	switch {
	case committed == unparented && l.diff != sys.Ident{}:
		return childless(l.diff), nil
	case committed == unparented:
		diff, err := sys.StatDir(l.fd, diffName)
		if exhausted(err) {
			return "", fmt.Errorf("%s: %w", diffName, err)
		}
		if err != nil {
			return "", nil //nolint:nilerr // it is damaged
		}
		return childless(diff.Ident), nil
	case listfd < 0:
		return "", nil
	}
	var st unix.Stat_t
	if err := sys.Fstat(listfd, &st); err != nil {
		return "", fmt.Errorf("%s: %w", childrenName, err)
	}
	return fmt.Sprintf("%s.%d", committed, st.Ino), nil
}

// seal returns what listed holds for a state. Where names may reach the disk in another order than they were made in, a
// child could be there after a power cut without its entry: no seal outlives one.
func (d *Driver) seal(state string) string {
	switch d.facts.backingFS {
	case "extfs", "xfs", "tmpfs":
		return state
	}
	return d.instance + ":" + state
}

// listsAll reports whether all children of the layer are in its list. The caller has the layer to itself.
func (d *Driver) listsAll(l *layer, listfd int) (bool, error) {
	committed, err := l.committedState()
	if err != nil {
		return false, err
	}
	state, err := l.listState(committed, listfd)
	if err != nil || state == "" {
		return false, err
	}
	seal, err := sys.Readlinkat(l.fd, listedName)
	return err == nil && seal == d.seal(state), nil // what cannot be read is no seal
}

// setSeal seals the list, which is whole as long as committed is in this state.
func (d *Driver) setSeal(l *layer, listfd int, committed string) error {
	state, err := l.listState(committed, listfd)
	if err != nil || state == "" {
		return err
	}
	// Not by one rename: a crash in between leaves no seal, which is never wrong.
	if err := ignoreAbsent(sys.Unlinkat(l.fd, listedName, 0)); err != nil {
		return fmt.Errorf("%s: %w", listedName, err)
	}
	// Another call may have sealed it in this moment: its seal holds and is right, or does not hold.
	if err := sys.Symlinkat(d.seal(state), l.fd, listedName); err != nil && err != unix.EEXIST {
		return fmt.Errorf("%s: %w", listedName, err)
	}
	return nil
}

// enlist marks a layer as committed and lists a child of it, that is going to appear or to get this parent.
func (d *Driver) enlist(p *layer, link, id string) (err error) {
	made, err := p.commit()
	if err != nil {
		return err
	}
	listfd, err := p.makeList()
	if err != nil || listfd < 0 {
		return err // less than 0: damaged, no seal holds without a list
	}
	defer func() { err = errors.Join(err, sys.Close(listfd)) }()
	name, target := childEntry(link, id)
	if err := sys.Symlinkat(target, listfd, name); err != nil && err != unix.EEXIST {
		return fmt.Errorf("%s: %w", childrenName, err)
	}
	if made == "" {
		return nil
	}
	// Until the file was made, by us, the layer had no child that is not listed, if it was sealed so. Another call that
	// makes a child now lists it before that appears, and Docker breaks the seal even before it is set.
	seal, err := sys.Readlinkat(p.fd, listedName)
	if err == unix.ENOENT || err == unix.EINVAL {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", listedName, err)
	}
	before, err := p.listState(unparented, listfd)
	if err != nil || before == "" || seal != d.seal(before) {
		return err
	}
	return d.setSeal(p, listfd, made)
}

// unlistFrom takes a child from the list of a layer.
func (l *layer) unlistFrom(link, id string) error {
	return unlistAt(l.fd, childrenName, link, id)
}

// unlistAt takes a child from a list. What lies in the place of one and is no directory holds none.
func unlistAt(dirfd int, list, link, id string) error {
	name, _ := childEntry(link, id)
	err := sys.Unlinkat(dirfd, list+"/"+name, 0)
	if err == unix.ENOTDIR {
		return nil
	}
	return ignoreAbsent(err)
}

// commit marks the layer as one that has a child. Made is the state of the file if this call has made it, and if that
// surely changes with the file.
func (l *layer) commit() (made string, err error) {
	committed, err := l.has(committedName)
	if err != nil || committed {
		return "", err
	}
	var random [4]byte
	_, _ = rand.Read(random[:]) // never fails
	mark := unix.NsecToTimespec(markSec*1e9 + int64(binary.NativeEndian.Uint32(random[:])%1e9))
	ino, err := sys.MakeEmptyAt(l.fd, committedName, 0o600, mark)
	if err != nil && err != unix.EEXIST {
		return "", fmt.Errorf("%s: %w", committedName, err)
	}
	if ino != 0 {
		made = markState(ino, mark)
	}
	return made, nil
}

// unlist takes a layer that has gone from the list of its parent. dirfd is what was its directory.
func (s *staging) unlist(dirfd int, link, id string) error {
	var buf [len(linkPrefix) + linkid.Length]byte
	data, err := sys.ReadStartAt(dirfd, lowerName, buf[:])
	if err != nil {
		return ignoreAbsent(err)
	}
	parentLink, ok := strings.CutPrefix(string(data), linkPrefix)
	if !ok || !linkid.Valid(parentLink) {
		return nil
	}
	return s.unlistOf(parentLink, link, id)
}

// unlistOf takes a layer from the list of one that it is no child of any more. An entry that stays for whatever reason
// costs a look, no more.
func (s *staging) unlistOf(parentLink, link, id string) error {
	target, err := sys.Readlinkat(s.homefd, linkPrefix+parentLink)
	if err != nil {
		return ignoreAbsent(err)
	}
	parent, _ := parseLinkTarget(target)
	if parent == "" {
		return nil
	}
	return unlistAt(s.homefd, parent+"/"+childrenName, link, id)
}

// absent reports whether surely nothing of this name is in the home.
func (s *staging) absent(id string) bool {
	var st unix.Stat_t
	return sys.Fstatat(s.homefd, id, &st) == unix.ENOENT
}

// listedChild returns a child of the layer by its list, "" if no entry is about one. Odd says that the list does not tell:
// an entry may be about a child that is damaged. links are the layer's. Entries of layers that are gone are removed.
func (s *staging) listedChild(l *layer, listfd int, links []string) (child string, odd bool, err error) {
	var gone []string
	var failed error
	err = sys.ReadNames(listfd, func(name string) bool {
		id := childID(listfd, name)
		if id == "" {
			odd = true
			return true
		}
		has, err := s.chainHas(id, links)
		if has || err != nil {
			child, failed = id, err
			return false
		}
		if s.absent(id) {
			gone = append(gone, name)
		} else {
			odd = true
		}
		return true
	})
	if failed != nil {
		return child, odd, failed
	}
	if err != nil {
		return "", odd, fmt.Errorf("%s: %w", childrenName, err)
	}
	if child != "" {
		for _, name := range gone {
			_ = sys.Unlinkat(listfd, name, 0) // the next time is quicker
		}
	}
	return child, odd, nil
}

// readList returns the names in the list of the layer's children, nil if its seal does not hold. It is for
// Check, which does not know whether power was cut.
func (l *layer) readList() (map[string]bool, error) {
	listfd, _, err := l.openList()
	if err != nil || listfd < 0 {
		return nil, err
	}
	defer func() { _ = sys.Close(listfd) }()
	seal, err := sys.Readlinkat(l.fd, listedName)
	if err != nil {
		return nil, nil // what cannot be read is no seal
	}
	names := map[string]bool{}
	if err := sys.ReadNames(listfd, func(name string) bool { names[name] = true; return true }); err != nil {
		return nil, fmt.Errorf("%s: %w", childrenName, err)
	}
	// After the names: whoever makes a child while they are read has listed it, or breaks the seal.
	committed, err := l.committedState()
	if err != nil {
		return nil, err
	}
	state, err := l.listState(committed, listfd)
	if err != nil || state == "" || seal[strings.LastIndexByte(seal, ':')+1:] != state {
		return nil, err
	}
	return names, nil
}
