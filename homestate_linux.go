//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// homeState is what the metadata of a home were seen to be. Reading it changes nothing; what is
// wrong with it (problems) and what would mend it (plan) are functions of it.
type homeState struct {
	path    string
	homefd  int
	lfd     int
	home, l seenFile
	layers  map[string]*seenLayer
	odd     map[string]error    // what is no layer, by its name in the home
	links   map[string]seenLink // what lies in l/, by name
	// pending has the links of layers that are being made or deleted.
	pending  map[string]bool
	leftover []string // in staging, by a crash
	alone    bool     // the caller holds the staging directory: nothing is being made
	// unread is what the machine could not read, by path. What is not known must not be taken for missing.
	unread map[string]error
}

// seenFile is a file as lstat has it.
type seenFile struct {
	mode, uid uint32
	size      int64
	err       error
}

func (f seenFile) kind() uint32 { return f.mode & unix.S_IFMT }
func (f seenFile) perm() uint32 { return f.mode & 0o7777 }
func (f seenFile) absent() bool { return f.err == unix.ENOENT }
func (f seenFile) there() bool  { return f.err == nil }
func (f seenFile) is(kind uint32) bool {
	return f.err == nil && f.kind() == kind
}

// seenLayer is what a layer's directory was seen to hold.
type seenLayer struct {
	id  string
	dir seenFile
	// busy says that a call is at work on the layer now, in whatever process.
	busy bool

	diff, work, merged, linkFile, lowerFile, committed, incomplete, list seenFile

	// listed are the names in the list of its children, nil if it is not sealed.
	listed map[string]bool

	link     string // "" if linkErr
	linkErr  error
	foreign  string   // if linkErr, the name of something in it that is no layer's
	lowers   []string // none for a base layer, or if lowerErr
	lowerErr error
	rawLower string // what the file holds, if it is a file
	// mergedErr is what is wrong with merged.
	mergedErr error
	// unsynced says that the layer was mounted with volatile, and is not now.
	unsynced bool
}

// seenLink is an entry of l/.
type seenLink struct {
	target string
	id     string // of the layer that the target names, "" if it names none
	err    error  // why it is no link to a layer
}

// readHome reads the metadata of a home. The caller closes it.
func readHome(path string) (_ *homeState, err error) {
	h := &homeState{path: path, homefd: -1, lfd: -1, layers: map[string]*seenLayer{}, odd: map[string]error{}, links: map[string]seenLink{}, unread: map[string]error{}}
	defer func() {
		if err != nil {
			h.close() // the caller gets none
		}
	}()
	if h.homefd, err = sys.OpenRoot(path); err != nil {
		return nil, err
	}
	if h.lfd, err = sys.OpenDirat(h.homefd, linkDir); err != nil {
		return nil, fmt.Errorf("%s: %w", linkDir, err)
	}
	h.home, h.l = h.stat(h.homefd, ".", "."), h.stat(h.lfd, ".", linkDir)
	var names []string
	if err := sys.ReadNames(h.homefd, func(name string) bool { names = append(names, name); return true }); err != nil {
		return nil, err
	}
	for _, name := range names {
		h.readEntry(name, false)
	}
	names = nil
	if err := sys.ReadNames(h.lfd, func(name string) bool { names = append(names, name); return true }); err != nil {
		return nil, fmt.Errorf("%s: %w", linkDir, err)
	}
	for _, name := range names {
		h.readLink(name)
	}
	if err := h.readStaging(); err != nil {
		return nil, err
	}
	return h, nil
}

func (h *homeState) close() {
	for _, fd := range []int{h.homefd, h.lfd} {
		if fd >= 0 {
			_ = sys.Close(fd) // opened for reading: nothing can be lost
		}
	}
}

// stat looks at a file, which has this path in the home.
func (h *homeState) stat(dirfd int, name, path string) seenFile {
	var st unix.Stat_t
	if err := sys.Fstatat(dirfd, name, &st); err != nil {
		h.note(path, err)
		return seenFile{err: err}
	}
	return seenFile{mode: st.Mode, uid: st.Uid, size: st.Size}
}

// note keeps an error that says nothing about what it is about.
func (h *homeState) note(path string, err error) {
	if exhausted(err) || err == unix.EACCES || err == unix.EPERM {
		h.unread[path] = err
	}
}

// forget drops what was noted about a file, or what is in it, that is read again.
func (h *homeState) forget(path string) {
	maps.DeleteFunc(h.unread, func(noted string, _ error) bool { return noted == path || strings.HasPrefix(noted, path+"/") })
}

// known returns an error if something could not be read.
func (h *homeState) known() (err error) {
	for _, path := range slices.Sorted(maps.Keys(h.unread)) {
		err = errors.Join(err, fmt.Errorf("%s: %w", path, h.unread[path]))
	}
	return err
}

// readEntry reads one entry of the home. If locked, a layer is read under its lock, if that can be had.
func (h *homeState) readEntry(name string, locked bool) {
	if name == linkDir || name == stagingDir || name == deviceName {
		return
	}
	delete(h.odd, name)
	delete(h.layers, name)
	h.forget(name)
	l, err := openLayer(h.path, name)
	if errors.Is(err, ErrLayerNotFound) {
		return
	}
	if err != nil {
		h.note(name, err)
		h.odd[name] = err
		return
	}
	defer l.close()
	busy := false
	if locked {
		busy = !lockSoon(l.fd, unix.LOCK_SH, 100*time.Millisecond)
	}
	s := h.readLayer(l)
	s.busy = busy
	if !l.isThere() {
		return // removed meanwhile
	}
	if name == lostFoundName && s.linkFile.absent() && s.diff.absent() {
		return
	}
	h.layers[name] = s
}

// isThere reports whether the layer is still that of its ID.
func (l *layer) isThere() bool { return !errors.Is(l.gone(unix.ENOENT), ErrLayerNotFound) }

// lockSoon takes a lock that others hold for moments only. If they do not let go it returns false.
func lockSoon(fd, how int, within time.Duration) bool {
	for wait, end := time.Millisecond, time.Now().Add(within); ; wait = min(2*wait, 10*time.Millisecond) {
		err := sys.Flock(fd, how|unix.LOCK_NB)
		if err == nil {
			return true
		}
		if err != unix.EWOULDBLOCK || time.Now().After(end) {
			return false
		}
		time.Sleep(wait)
	}
}

// readLayer reads the files of one layer.
func (h *homeState) readLayer(l *layer) *seenLayer {
	s := &seenLayer{id: l.id, dir: h.stat(l.fd, ".", l.id)}
	for name, f := range map[string]*seenFile{
		diffName: &s.diff, workName: &s.work, mergedName: &s.merged, linkName: &s.linkFile, lowerName: &s.lowerFile,
		committedName: &s.committed, incompleteName: &s.incomplete, childrenName: &s.list,
	} {
		*f = h.stat(l.fd, name, l.id+"/"+name)
	}
	if s.link, s.linkErr = l.link(); s.linkErr != nil {
		h.note(l.id+"/"+linkName, s.linkErr)
		var err error
		s.foreign, err = l.foreign()
		h.note(l.id, err)
	}
	if s.lowers, s.lowerErr = l.lowers(); s.lowerErr != nil {
		h.note(l.id+"/"+lowerName, s.lowerErr)
		if s.lowerFile.is(unix.S_IFREG) {
			raw, err := sys.ReadFileAt(l.fd, lowerName, maxLowerFile)
			h.note(l.id+"/"+lowerName, err)
			s.rawLower = string(raw)
		}
	}
	if s.list.is(unix.S_IFDIR) {
		var err error
		s.listed, err = l.readList()
		h.note(l.id+"/"+childrenName, err)
	}
	if s.work.is(unix.S_IFDIR) {
		s.unsynced = h.stat(l.fd, volatileMark, l.id+"/"+volatileMark).there()
	}
	if !s.merged.absent() {
		mounted, err := l.mounted()
		switch {
		case err != nil:
			h.note(l.id+"/"+mergedName, err)
			s.mergedErr = err
		case !mounted:
			s.mergedErr = corrupt("nothing is mounted there")
		default:
			s.unsynced = false
		}
	}
	return s
}

// readLink reads one entry of l/.
func (h *homeState) readLink(name string) {
	delete(h.links, name)
	h.forget(linkPrefix + name)
	target, err := sys.Readlinkat(h.lfd, name)
	if err == unix.ENOENT {
		return
	}
	s := seenLink{target: target}
	switch {
	case err != nil:
		h.note(linkDir+"/"+name, err)
		s.err = corrupt("not a link: %w", err)
	default:
		// That a layer is incomplete is reported with its marker.
		if s.id, err = parseLinkTarget(target); s.id == "" {
			s.err = err
		}
	}
	h.links[name] = s
}

// readStaging reads what a crash left in the staging directory: layers that never appeared,
// unless some process holds the lock and may be making them. Trash is in order: it
// waits for deletion, here or in another process, and the next New goes on with it.
func (h *homeState) readStaging() error {
	h.leftover, h.pending = nil, map[string]bool{}
	fd, err := sys.OpenDirat(h.homefd, stagingDir)
	if err != nil {
		return ignoreAbsent(err) // a home that only Docker has used
	}
	defer func() { _ = sys.Close(fd) }()
	alone := h.alone || sys.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil
	return sys.ReadNames(fd, func(name string) bool {
		if !alone {
			if data, err := sys.ReadFileAt(fd, name+"/"+linkName, linkid.Length); err == nil {
				h.pending[string(data)] = true
			}
		} else if !strings.HasPrefix(name, trashPrefix) && !strings.HasPrefix(name, unsyncedPrefix) && !strings.HasPrefix(name, boundPrefix) {
			h.leftover = append(h.leftover, name)
		}
		return true
	})
}

// reread reads again, each under its lock, the layers and links that have problems, and those that
// these have to do with.
func (h *homeState) reread(problems []Problem) error {
	ids, links := map[string]bool{}, map[string]bool{}
	layer := func(id string) {
		if id == "" || ids[id] {
			return
		}
		ids[id] = true
		if l := h.layers[id]; l != nil {
			links[l.link] = true
			for _, link := range l.lowers {
				links[link] = true
			}
		}
	}
	for _, p := range problems {
		layer(p.ID)
		if link, ok := strings.CutPrefix(p.Path, linkPrefix); ok {
			links[link] = true
		} else if !strings.Contains(p.Path, "/") {
			ids[p.Path] = true
		}
	}
	delete(links, "")
	for link := range links {
		h.readLink(link)
		layer(h.links[link].id)
	}
	// Parents first: a child that is still there then was so before, and listed.
	depth := func(id string) int {
		if l := h.layers[id]; l != nil {
			return len(l.lowers)
		}
		return 0
	}
	for _, id := range slices.SortedFunc(maps.Keys(ids), func(a, b string) int { return depth(a) - depth(b) }) {
		h.readEntry(id, true)
		if l := h.layers[id]; l != nil && l.link != "" {
			h.readLink(l.link)
		}
	}
	if err := h.readStaging(); err != nil {
		return err
	}
	// A layer that was in neither place may have come from one to the other meanwhile, or be gone with its link.
	for link := range links {
		if id := h.links[link].id; id != "" && h.layers[id] == nil && !h.pending[link] {
			h.readEntry(id, true)
			h.readLink(link)
		}
	}
	return nil
}

// settlePause is how long a home is left alone before what looks wrong is read again.
const settlePause = 20 * time.Millisecond

// settle reads again what has problems until what is left cannot be what somebody is just doing: Docker
// takes no locks, and a layer is not made or mounted by one call. That something could not be read is an error.
func (h *homeState) settle() ([]Problem, error) {
	problems := h.problems()
	for round, n := 0, 0; len(problems) > 0 && (round < 2 || len(problems) != n); round++ {
		n = len(problems)
		time.Sleep(settlePause)
		if err := h.reread(problems); err != nil {
			return nil, err
		}
		before := make(map[string]bool, len(problems))
		for _, p := range problems {
			before[p.String()] = true
		}
		problems = slices.DeleteFunc(h.problems(), func(p Problem) bool { return !before[p.String()] })
	}
	return problems, h.known()
}

// goodOwner reports whether a file of the driver's own may belong to uid: whoever owns the home, or runs this.
func (h *homeState) goodOwner(uid uint32) bool {
	return uid == h.home.uid || int(uid) == os.Geteuid() || !h.home.there()
}

// layerDir returns a layer's directory with an owner that goodOwner knows, if it belongs to the remapped root: Docker before 20.10.3
// gave it to that, with mode 0700, as it gives work still, and diff, by which it is told. In a home that a later Docker has given to root
// it must stay so, or the remapped root could not get to the layer.
func (h *homeState) layerDir(l *seenLayer) seenFile {
	dir, root := l.dir, l.work
	if !root.is(unix.S_IFDIR) {
		root = l.diff // of a base layer; else it may belong to whomever the content says
	}
	if root.is(unix.S_IFDIR) && root.uid == dir.uid {
		dir.uid = h.home.uid
	}
	return dir
}
