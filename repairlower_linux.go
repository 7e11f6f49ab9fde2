//go:build linux

package overlay2

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// minPrefix is the length of what must be left of a lower file to know the chain by it: of
// "l/" and 26 characters. 8 characters of base32 are one of 10^12.
const minPrefix = len(linkPrefix) + 8

// planLowers finds out the chain of each layer whose lower file is lost or contradicts others. A
// layer's chain is known from any layer above: it holds the chains of all below it.
func (p *planner) planLowers() {
	p.planAliases()
	for {
		tails := p.tails(p.suspects())
		mended := false
		for _, id := range p.ids {
			mended = p.mendLower(p.h.layers[id], tails) || mended
		}
		if !mended {
			return
		}
	}
}

// planAliases plans for chains that name a layer by a second link that leads to it.
func (p *planner) planAliases() {
	for _, id := range p.ids {
		l := p.h.layers[id]
		lowers, known := slices.Clone(l.lowers), true
		for i, link := range lowers {
			if p.owner[link] == "" {
				lowers[i] = p.own[p.h.links[link].id]
				known = known && lowers[i] != ""
			}
		}
		if known && !slices.Equal(lowers, l.lowers) {
			p.setLower(l, lowers, "it names a layer by another link than its own")
		}
	}
}

// suspects returns the layers whose lower file is damaged or contradicts that of a parent or child.
func (p *planner) suspects() map[string]bool {
	s := map[string]bool{}
	for _, l := range p.h.layers {
		if l.lowerErr != nil {
			s[l.id] = true
		} else if parent := p.parent(l); parent != nil && !slices.Equal(parent.lowers, l.lowers[1:]) {
			s[l.id], s[parent.id] = true, true
		}
	}
	return s
}

// parent returns the layer that the first element of a lower file stands for, nil if there is none.
func (p *planner) parent(l *seenLayer) *seenLayer {
	if len(l.lowers) == 0 {
		return nil
	}
	return p.h.layers[p.owner[l.lowers[0]]]
}

// tails returns what the chains of others say of these layers: each different one once.
func (p *planner) tails(of map[string]bool) map[string]map[string][]string {
	tails := map[string]map[string][]string{}
	if len(of) == 0 {
		return tails
	}
	for _, l := range p.h.layers {
		for i, link := range l.lowers {
			id := p.owner[link]
			if !of[id] || id == l.id {
				continue
			}
			if tails[id] == nil {
				tails[id] = map[string][]string{}
			}
			tails[id][strings.Join(l.lowers[i+1:], ":")] = l.lowers[i+1:]
		}
	}
	return tails
}

// only returns the one chain that others say, if they agree.
func only(tails map[string][]string) (chain []string, ok bool) {
	if len(tails) != 1 {
		return nil, false
	}
	for _, chain = range tails {
	}
	return chain, true
}

// mendLower plans for one lower file, or that of the layer's parent, if what is right is certain.
func (p *planner) mendLower(l *seenLayer, tails map[string]map[string][]string) bool {
	if l.lowerErr != nil {
		return p.mendLost(l, tails[l.id])
	}
	parent := p.parent(l)
	if parent == nil || parent == l || parent.lowerErr != nil || slices.Equal(parent.lowers, l.lowers[1:]) {
		return false
	}
	whole := append([]string{l.lowers[0]}, parent.lowers...)
	said, agreed := only(tails[l.id])
	if len(l.lowers) < len(whole) && slices.Equal(l.lowers, whole[:len(l.lowers)]) && p.fits(l, whole) &&
		p.fitsParent(parent) && (len(tails[l.id]) == 0 || agreed && slices.Equal(said, whole)) {
		p.setLower(l, whole, "it ends before the chain of its parent "+parent.id+" does")
		return true
	}
	said, agreed = only(tails[parent.id])
	if agreed && len(said) > 0 && p.fits(parent, said) {
		p.setLower(parent, said, "all layers above say so; its own may be another layer's, and that one's its own: verify its siblings")
		return true
	}
	return false
}

// mendLost plans for a lower file that says nothing.
func (p *planner) mendLost(l *seenLayer, tails map[string][]string) bool {
	said, agreed := only(tails)
	switch {
	case agreed && len(said) > 0 && p.fits(l, said):
		p.setLower(l, said, "the layers above say so")
		return true
	case agreed && len(said) == 0 && l.work.absent() && !l.lowerFile.absent():
		p.add(l.id, l.id+"/"+lowerName, "remove", "the layers above say that it is a base layer", func(r *repairer) error { return r.removeLower(l.id) })
		l.lowers, l.lowerErr, l.rawLower, l.lowerFile = nil, nil, "", seenFile{err: unix.ENOENT}
		return true
	case len(tails) > 0 || len(l.rawLower) < minPrefix:
		return false
	}
	var found []string
	for _, id := range p.ids {
		o := p.h.layers[id]
		if o == l || p.own[id] == "" || o.lowerErr != nil || slices.Contains(o.lowers, p.own[l.id]) {
			continue
		}
		chain := append([]string{p.own[id]}, o.lowers...)
		if strings.HasPrefix(encodeLower(chain), l.rawLower) {
			if found != nil {
				return false
			}
			found = chain
		}
	}
	if found == nil || !p.fits(l, found) {
		return false
	}
	p.setLower(l, found, "it begins like this, and like no other")
	return true
}

// fits reports whether the chain is one that the layer could have: the link of a parent and that one's own chain.
func (p *planner) fits(l *seenLayer, chain []string) bool {
	parent := p.h.layers[p.owner[chain[0]]]
	return parent != nil && parent != l && parent.lowerErr == nil && slices.Equal(parent.lowers, chain[1:]) &&
		p.own[l.id] != "" && !slices.Contains(chain, p.own[l.id])
}

// fitsParent reports whether a layer's own chain is one that it could have.
func (p *planner) fitsParent(l *seenLayer) bool { return len(l.lowers) == 0 || p.fits(l, l.lowers) }

// setLower plans to write a lower file.
func (p *planner) setLower(l *seenLayer, lowers []string, why string) {
	p.write(l, lowerName, encodeLower(lowers), 0o644, fmt.Sprintf("%s; %s", lowerProblem(l), why))
	l.lowers, l.lowerErr, l.rawLower = slices.Clone(lowers), nil, ""
	l.lowerFile = seenFile{mode: unix.S_IFREG | 0o644, uid: p.h.home.uid}
}

func lowerProblem(l *seenLayer) string {
	if l.lowerErr != nil {
		return l.lowerErr.Error()
	}
	return "wrong chain"
}
