//go:build linux

package overlay2

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"golang.org/x/sys/unix"
)

// step is an action and how it is done.
type repairStep struct {
	Action
	do func(r *repairer) error
}

// planner finds out what would mend a home. What it plans it does to its homeState at once, so that
// later steps build on earlier ones. It plans only what is certain: a link that a layer and l/
// disagree about is decided by what the layers above say, or not at all.
type planner struct {
	h     *homeState
	opts  RepairOpts
	ids   []string            // of layers, sorted
	own   map[string]string   // the link of each layer of which that is certain
	owner map[string]string   // the reverse
	into  map[string][]string // by layer: what in l/ leads to it, sorted
	steps []repairStep
	// orphan is a layer that is going to be removed since nothing leads to it.
	orphan string
}

// plan returns what would mend the home. That all layers would be orphans is an error: then it is another directory than
// the home, or so much is lost that none of them may go.
func (h *homeState) plan(opts RepairOpts) ([]repairStep, error) {
	p := &planner{h: h, opts: opts, ids: slices.Sorted(maps.Keys(h.layers)), own: map[string]string{}, owner: map[string]string{}, into: map[string][]string{}}
	for _, name := range slices.Sorted(maps.Keys(h.links)) {
		if id := h.links[name].id; id != "" && linkid.Valid(name) {
			p.into[id] = append(p.into[id], name)
		}
	}
	// What no link leads to and what holds something else than a layer does is somebody's directory.
	p.ids = slices.DeleteFunc(p.ids, func(id string) bool { return h.layers[id].foreign != "" && len(p.into[id]) == 0 })
	for _, name := range h.leftover {
		if strings.HasPrefix(name, newPrefix) || strings.HasPrefix(name, probePrefix) {
			p.add("", stagingDir+"/"+name, "delete", "left by a crash", func(r *repairer) error { return r.discardLeftover(name) })
		}
	}
	p.modes()
	p.planLinks()
	p.planLowers()
	for _, id := range p.ids {
		p.planFiles(h.layers[id])
	}
	p.planEntries()
	if p.orphan != "" && len(p.own) == 0 {
		return nil, fmt.Errorf("%s and all others would be removed: no layer here has a link", p.orphan)
	}
	return append(p.planLists(), p.steps...), nil // so that no list lacks a child at any moment
}

func (p *planner) add(id, path, what, why string, do func(r *repairer) error) {
	p.steps = append(p.steps, repairStep{Action{ID: id, Path: path, What: what, Why: why}, do})
}

// settle takes a layer's link as certain.
func (p *planner) settle(id, link string) { p.own[id], p.owner[link] = link, id }

// turnBack has the link of a whole layer lead to it, which was turned when its content was lost: a process that had filled it again
// ended just before that.
func (p *planner) turnBack(l *seenLayer) {
	if p.h.links[l.link].target != incompleteTarget(l.id) || !l.incomplete.absent() || l.busy {
		return
	}
	link, target := l.link, linkTarget(l.id)
	p.add(l.id, linkPrefix+link, "make it lead to "+target, "the layer is whole", func(r *repairer) error { return r.setLink(link, target) })
	p.h.links[link] = seenLink{target: target, id: l.id}
}

// planLinks finds out the link of each layer, where its link file and l/ disagree.
func (p *planner) planLinks() {
	claims := map[string]int{} // how many layers say that a link is theirs
	for _, id := range p.ids {
		if l := p.h.layers[id]; l.link != "" {
			claims[l.link]++
			if p.h.links[l.link].id == id {
				p.settle(id, l.link)
				p.turnBack(l)
			}
		}
	}
	named := p.named()
	var open []string
	for _, id := range p.ids {
		l := p.h.layers[id]
		if p.own[id] != "" {
			continue
		}
		link, why := p.knownLink(l, named, l.link != "" && claims[l.link] == 1)
		if link == "" {
			open = append(open, id)
			continue
		}
		p.mendLink(l, link, why)
	}
	p.planSwapped(open)
}

// knownLink returns the link of a layer whose link file and l/ disagree, or one of which is lost; "" if
// that is not certain. Alone says that no other layer claims the link that the file names.
func (p *planner) knownLink(l *seenLayer, named map[string]bool, alone bool) (link, why string) {
	into := p.into[l.id]
	if len(into) > 1 {
		if some := slices.DeleteFunc(slices.Clone(into), func(link string) bool { return !named[link] }); len(some) > 0 {
			into = some
		} else {
			into = into[:1] // nobody needs any of them
		}
	}
	// What lies in l/ under that name is a layer's of which it is not certain that it is another's.
	other := p.h.layers[p.h.links[l.link].id]
	doubtful := other != nil && p.own[other.id] == ""
	switch {
	case len(into) == 0 && alone && !doubtful:
		return l.link, "no link leads to the layer"
	case len(into) != 1 || l.link != "" && doubtful:
		return "", ""
	case l.link == "":
		return into[0], "this link leads to the layer"
	case alone && named[l.link] && !named[into[0]]:
		return l.link, "layers above name this link"
	case alone && named[l.link]:
		return "", ""
	}
	return into[0], "this link leads to the layer, " + l.link + " does not"
}

// named returns the links that layers have in their chains, damaged ones too.
func (p *planner) named() map[string]bool {
	named := map[string]bool{}
	for _, l := range p.h.layers {
		for _, link := range l.lowers {
			named[link] = true
		}
		for _, part := range strings.Split(l.rawLower, linkPrefix) {
			if len(part) >= linkid.Length && linkid.Valid(part[:linkid.Length]) {
				named[part[:linkid.Length]] = true
			}
		}
	}
	return named
}

// mendLink makes the layer's link file or the entry in l/ say that link is the layer's.
func (p *planner) mendLink(l *seenLayer, link, why string) {
	p.settle(l.id, link)
	if l.link != link {
		p.write(l, linkName, link, 0o644, why)
		l.link, l.linkErr, l.linkFile = link, nil, seenFile{mode: unix.S_IFREG | 0o644, uid: p.h.home.uid}
	}
	if p.h.links[link].id != l.id {
		target := linkTarget(l.id)
		if l.incomplete.there() {
			target = incompleteTarget(l.id) // so that nothing is mounted above it
		}
		p.add(l.id, linkPrefix+link, "make it lead to "+target, why, func(r *repairer) error { return r.setLink(link, target) })
		p.h.links[link] = seenLink{target: target, id: l.id}
	}
}

// planSwapped decides about layers of which one says that its link is what leads to the other. Either their
// link files are wrong or what lies in l/ is: that which leaves no layer above with a wrong chain is right.
func (p *planner) planSwapped(open []string) {
	var links, files map[string]string
	for range open { // until none drops out any more
		links, files = map[string]string{}, map[string]string{}
		open = slices.DeleteFunc(open, func(id string) bool {
			l := p.h.layers[id]
			return l.link == "" || len(p.into[id]) != 1 || !slices.Contains(open, p.h.links[l.link].id)
		})
		for _, id := range open {
			links[p.into[id][0]], files[p.h.layers[id].link] = id, id
		}
	}
	if len(open) == 0 || len(links) != len(open) || len(files) != len(open) {
		return
	}
	byLinks, byFiles := p.conflicts(links), p.conflicts(files)
	if byLinks > 0 && byFiles > 0 || byLinks == 0 && byFiles == 0 && p.anyNamed(links) {
		return
	}
	if byLinks == 0 {
		files = links
	}
	for _, link := range slices.Sorted(maps.Keys(files)) {
		p.mendLink(p.h.layers[files[link]], link, "exchanged with another's; only so the chains above are right")
	}
}

// anyNamed reports whether a layer has one of the links in its chain.
func (p *planner) anyNamed(links map[string]string) bool {
	named := p.named()
	for link := range links {
		if named[link] {
			return true
		}
	}
	return false
}

// conflicts counts the layers whose chains would be wrong if the links were those of these layers.
func (p *planner) conflicts(owners map[string]string) (n int) {
	ownerOf := func(link string) string {
		if id, ok := owners[link]; ok {
			return id
		}
		return p.owner[link]
	}
	for id, l := range p.h.layers {
		concerned, wrong := false, false
		for _, link := range l.lowers {
			_, is := owners[link]
			concerned = concerned || is
			wrong = wrong || ownerOf(link) == id
		}
		if !concerned {
			continue
		}
		parent := p.h.layers[ownerOf(l.lowers[0])]
		if wrong || parent == nil || parent.committed.absent() ||
			parent.lowerErr == nil && !slices.Equal(parent.lowers, l.lowers[1:]) {
			n++
		}
	}
	return n
}

// planFiles plans for what lies in a layer beside link and lower.
func (p *planner) planFiles(l *seenLayer) {
	if p.own[l.id] == "" && l.link == "" && len(p.into[l.id]) == 0 && l.committed.absent() && l.mergedErr == nil && p.opts.RemoveOrphans {
		p.orphan = l.id
		p.add(l.id, l.id, "delete the layer", "no link leads to it, and it does not say which is its own", func(r *repairer) error { return r.discardLayer(l.id) })
		return
	}
	if len(l.lowers) > 0 && !l.work.is(unix.S_IFDIR) {
		p.add(l.id, l.id+"/"+workName, "make an empty directory", notDir(l.work).Error(), func(r *repairer) error { return r.makeWork(l.id) })
	}
	parent := p.h.layers[p.owner[first(l.lowers)]]
	if parent != nil && parent != l && parent.committed.absent() {
		p.write(parent, committedName, "", 0o600, "layer "+l.id+" is its child")
		parent.committed = seenFile{mode: unix.S_IFREG | 0o600, uid: p.h.home.uid}
	}
	if l.committed.there() && (l.committed.kind() != unix.S_IFREG || l.committed.size != 0) {
		p.write(l, committedName, "", 0o600, "not an empty file")
	}
	if l.mergedErr != nil && !l.busy {
		p.add(l.id, l.id+"/"+mergedName, "remove", l.mergedErr.Error(), func(r *repairer) error { return r.removeMerged(l.id) })
	}
}

// planLists plans for what lacks in the lists of children, as the home is when all else is done.
func (p *planner) planLists() []repairStep {
	done := p.steps
	p.steps = nil
	for _, id := range p.ids {
		l := p.h.layers[id]
		if l.list.there() && !l.list.is(unix.S_IFDIR) {
			p.add(id, id+"/"+childrenName, "remove", notDir(l.list).Error(), func(r *repairer) error { return r.removeList(id) })
		}
		parent := p.h.layers[p.owner[first(l.lowers)]]
		if parent != nil && parent != l && parent.misses(l) {
			p.add(id, parent.id+"/"+childrenName, "list layer "+id, "its parent is "+parent.id, func(r *repairer) error { return r.list(parent.id, l.link, id) })
		}
	}
	steps := p.steps
	p.steps = done
	return steps
}

// first returns the first of links, "" if there is none.
func first(links []string) string {
	if len(links) == 0 {
		return ""
	}
	return links[0]
}

// planEntries plans for what is left in l/ that is no layer's: it goes if nobody can need it.
func (p *planner) planEntries() {
	needed := p.named()
	for _, l := range p.h.layers {
		needed[l.link] = true
	}
	for _, name := range slices.Sorted(maps.Keys(p.h.links)) {
		link := p.h.links[name]
		if needed[name] || !linkid.Valid(name) || link.target == "" || p.h.pending[name] {
			continue
		}
		if p.h.odd[link.id] != nil {
			continue // something is there, as a symlink to a layer on another disk, which Docker follows
		}
		why := "leads nowhere, and no layer has it"
		if p.h.layers[link.id] != nil {
			if p.own[link.id] == "" {
				continue
			}
			why = fmt.Sprintf("layer %s has the link %s", link.id, p.own[link.id])
		}
		p.add(link.id, linkPrefix+name, "remove", why, func(r *repairer) error { return r.removeLink(name, link.target) })
	}
}

// modes plans for modes and owners.
func (p *planner) modes() {
	fix := func(id, path string, f seenFile, usual uint32) {
		if !f.there() {
			return
		}
		if wrongMode(f.perm(), usual) {
			mode := (f.perm() | usual&0o700) &^ (0o066 &^ usual)
			p.add(id, path, fmt.Sprintf("set mode %04o", mode), fmt.Sprintf("mode is %04o", f.perm()), func(r *repairer) error { return r.chmod(path, mode) })
		}
		if !p.h.goodOwner(f.uid) {
			p.add(id, path, fmt.Sprintf("give it to user %d", p.h.home.uid), fmt.Sprintf("belongs to user %d", f.uid), func(r *repairer) error { return r.chown(path, p.h.home.uid) })
		}
	}
	fix("", ".", p.h.home, 0o755)
	fix("", linkDir, p.h.l, 0o700)
	for _, id := range p.ids {
		l := p.h.layers[id]
		fix(id, id, p.h.layerDir(l), 0o710)
		if l.work.is(unix.S_IFDIR) {
			work := l.work
			work.uid = p.h.home.uid // it is the remapped root's
			fix(id, id+"/"+workName, work, 0o700)
		}
		for _, f := range []struct {
			name string
			file seenFile
		}{{linkName, l.linkFile}, {lowerName, l.lowerFile}, {committedName, l.committed}} {
			if f.file.is(unix.S_IFREG) {
				fix(id, id+"/"+f.name, f.file, 0o644)
			}
		}
	}
}

// write plans to write one of a layer's files anew.
func (p *planner) write(l *seenLayer, name, content string, mode uint32, why string) {
	what := fmt.Sprintf("write %q", content)
	if content == "" {
		what = "make an empty file"
	}
	p.add(l.id, l.id+"/"+name, what, why, func(r *repairer) error { return r.write(l.id, name, content, mode) })
}
