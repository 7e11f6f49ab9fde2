//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"golang.org/x/sys/unix"
)

// Check reads the whole home and returns all that is not as docs/format.md says, sorted by
// path; none for a home in order. It changes nothing. What calls in this or another process are
// just doing is no problem: what looks wrong is looked at again, under the layer's lock.
//
// The error is of reading the home itself, or of files in it that cannot be read for want of memory, descriptors, rights or a working
// disk: what is returned with that are the problems as far as they are known.
func (d *Driver) Check() ([]Problem, error) {
	problems, err := CheckHome(d.home)
	return slices.DeleteFunc(problems, func(p Problem) bool {
		return errors.Is(p.Err, ErrUnsynced) && d.volatile.has(p.ID) // by this Driver: nothing has crashed since
	}), err
}

// CheckHome is Check without a Driver: it writes nothing, and takes no lock for longer than a layer
// is read, so that the home may be in use, by dockerd too.
func CheckHome(home string) ([]Problem, error) {
	problems, err := checkHome(home)
	if err != nil {
		return problems, fmt.Errorf("check %s: %w", home, err)
	}
	return problems, nil
}

func checkHome(home string) ([]Problem, error) {
	h, err := readHome(home)
	if err != nil {
		return nil, err
	}
	defer h.close()
	return h.settle()
}

// problems returns all that is wrong, sorted by path.
func (h *homeState) problems() []Problem {
	f := &findings{h: h}
	f.mode("", ".", h.home, 0o755) // New takes a home that is there as it is
	f.mode("", linkDir, h.l, 0o700)
	for name, err := range h.odd {
		f.add("", name, err)
	}
	for _, l := range h.layers {
		f.layer(l)
	}
	f.chains()
	for name, link := range h.links {
		f.link(name, link)
	}
	for _, name := range h.leftover {
		f.add("", stagingDir+"/"+name, corrupt("left by a crash"))
	}
	slices.SortStableFunc(f.problems, func(a, b Problem) int {
		return strings.Compare(a.Path+"\x00"+a.Err.Error(), b.Path+"\x00"+b.Err.Error())
	})
	return f.problems
}

// findings collects the problems of a home.
type findings struct {
	h        *homeState
	problems []Problem
}

func (f *findings) add(id, path string, err error) {
	f.problems = append(f.problems, Problem{ID: id, Path: path, Err: err})
}

// mode reports a mode that lets others in, or the owner not, and an owner who cannot be. Docker's
// versions differ in the rest (0700, 0701, 0710, 0711).
func (f *findings) mode(id, path string, file seenFile, usual uint32) {
	if !file.there() {
		return
	}
	if wrongMode(file.perm(), usual) {
		f.add(id, path, corrupt("mode is %04o, not %04o", file.perm(), usual))
	}
	if !f.h.goodOwner(file.uid) {
		f.add(id, path, corrupt("belongs to user %d", file.uid))
	}
}

// wrongMode reports whether a mode is certainly not one that the driver, or Docker, gives a file of its own.
func wrongMode(perm, usual uint32) bool {
	owner, others := usual&0o600, uint32(0o066)&^usual
	return perm&owner != owner || perm&others != 0
}

// layer looks at the files of one layer.
func (f *findings) layer(l *seenLayer) {
	at := func(name string, err error) {
		if err != nil {
			f.add(l.id, l.id+"/"+name, err)
		}
	}
	f.mode(l.id, l.id, f.h.layerDir(l), 0o710)
	at(diffName, notDir(l.diff))
	switch target := f.h.links[l.link]; {
	case l.linkErr != nil:
		at(linkName, l.linkErr)
	case target.id == l.id: // an incomplete one is reported with its marker
		if target.target != linkTarget(l.id) && l.incomplete.absent() && !l.busy {
			at(linkName, corrupt("%s/%s leads to %q", linkDir, l.link, target.target))
		}
	case target == (seenLink{}):
		at(linkName, corrupt("%s/%s: %w", linkDir, l.link, unix.ENOENT))
	case target.err != nil:
		at(linkName, corrupt("%s/%s: %w", linkDir, l.link, target.err))
	default:
		at(linkName, corrupt("%s/%s leads to %q", linkDir, l.link, target.target))
	}
	at(lowerName, l.lowerErr)
	if len(l.lowers) > 0 {
		at(workName, notDir(l.work))
	}
	if l.committed.there() && (l.committed.kind() != unix.S_IFREG || l.committed.size != 0) {
		at(committedName, corrupt("not an empty file"))
	}
	for name, file := range map[string]seenFile{linkName: l.linkFile, lowerName: l.lowerFile, committedName: l.committed} {
		if file.is(unix.S_IFREG) {
			f.mode(l.id, l.id+"/"+name, file, 0o644)
		}
	}
	if l.list.there() {
		at(childrenName, notDir(l.list))
	}
	if l.work.is(unix.S_IFDIR) && wrongMode(l.work.perm(), 0o700) {
		at(workName, corrupt("mode is %04o, not 0700", l.work.perm()))
	}
	if l.busy {
		return
	}
	if !l.incomplete.absent() {
		at(incompleteName, errors.Join(ErrIncomplete, l.incomplete.err))
	}
	at(mergedName, l.mergedErr)
	if l.unsynced {
		at(volatileMark, unsynced())
	}
}

// notDir returns ErrCorrupt unless the file is a directory.
func notDir(f seenFile) error {
	switch {
	case f.err != nil:
		return corrupt("%w", f.err)
	case f.kind() != unix.S_IFDIR:
		return corrupt("%w", unix.ENOTDIR)
	}
	return nil
}

// chains looks at the chain of each layer: each link leads to a layer, a parent is
// committed, and its own chain is the rest of the child's.
func (f *findings) chains() {
	owners := make(map[string]string, len(f.h.layers))
	for _, id := range slices.Sorted(maps.Keys(f.h.layers)) { // the next look finds the same, or settle drops it
		l := f.h.layers[id]
		if l.link == "" {
			continue
		}
		if other, twice := owners[l.link]; twice {
			f.add(id, id+"/"+linkName, corrupt("layer %s has the same link %s", other, l.link))
			if f.h.links[l.link].id == other {
				continue
			}
		}
		owners[l.link] = id
	}
	for id, l := range f.h.layers {
		for _, link := range l.lowers {
			if owner, ok := owners[link]; !ok {
				f.add(id, id+"/"+lowerName, corrupt("no layer has the link %s", link))
			} else if owner == id {
				f.add(id, id+"/"+lowerName, corrupt("names the layer itself"))
			}
		}
		if len(l.lowers) == 0 {
			continue
		}
		parent := f.h.layers[owners[l.lowers[0]]]
		if parent == nil || parent == l {
			continue
		}
		if parent.misses(l) {
			f.add(id, parent.id+"/"+childrenName, corrupt("layer %s is missing in the list", id))
		}
		if !slices.Equal(parent.lowers, l.lowers[1:]) {
			f.add(id, id+"/"+lowerName, corrupt("not the link and the chain of its parent %s", parent.id))
		}
		if parent.committed.err != nil {
			f.add(parent.id, parent.id+"/"+committedName, corrupt("has child %s: %w", f.h.firstChild(l.lowers[0]), parent.committed.err))
		}
	}
	f.problems = slices.CompactFunc(slices.SortedFunc(slices.Values(f.problems), func(a, b Problem) int {
		return strings.Compare(a.String(), b.String())
	}), func(a, b Problem) bool { return a.String() == b.String() })
}

// misses reports whether the layer's list of children is sealed, and a child is not in it.
func (l *seenLayer) misses(child *seenLayer) bool {
	name, _ := childEntry(child.link, child.id)
	return l.listed != nil && child.link != "" && !l.listed[name]
}

// firstChild returns the first layer, by ID, whose parent has this link.
func (h *homeState) firstChild(link string) string {
	first := ""
	for id, l := range h.layers {
		if len(l.lowers) > 0 && l.lowers[0] == link && (first == "" || id < first) {
			first = id
		}
	}
	return first
}

// link reports an entry of l/ that is no layer's.
func (f *findings) link(name string, link seenLink) {
	path := linkPrefix + name
	switch l := f.h.layers[link.id]; {
	case !linkid.Valid(name):
		f.add("", path, corrupt("not the name of a link"))
	case link.err != nil:
		f.add("", path, link.err)
	case l == nil:
		if !f.h.pending[name] {
			f.add(link.id, path, corrupt("leads to layer %s, which is not there", link.id))
		}
	case l.link == "":
		f.add(link.id, path, corrupt("layer %s does not say that this is its link", link.id))
	case l.link != name:
		f.add(link.id, path, corrupt("layer %s has the link %s", link.id, l.link))
	}
}
