//go:build linux

package overlay2

import (
	"sync"

	"github.com/bcc2decd/overlay2/internal/sys"
)

// maxKnownLinks bounds the memory of knownLinks: some hundred bytes each.
const maxKnownLinks = 1 << 14

// knownLinks remembers which directory the link of a layer led to when it was last followed
// strictly (see resolveLink). If the kernel, asked again, comes to the very same directory by
// the link then nothing between the two has changed that matters: one call instead of three,
// on each layer of each mount. A link that leads to any other directory, or to none, is
// followed strictly again; so what is remembered saves time and decides nothing.
type knownLinks struct {
	mu sync.Mutex
	m  map[string]knownLink // by link
}

type knownLink struct {
	id   string
	name sys.Name // the link, as the kernel wants it
	diff sys.Ident
}

// still reports whether the link leads where it did. lfd is l/, open.
func (l *knownLink) still(lfd int) bool {
	if l.id == "" {
		return false
	}
	now, err := sys.IdentDir(lfd, l.name)
	return err == nil && now.Same(l.diff)
}

// lookup returns what is known of each link, an empty knownLink if nothing is.
func (k *knownLinks) lookup(links []string) []knownLink {
	known := make([]knownLink, len(links))
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, link := range links {
		known[i] = k.m[link]
	}
	return known
}

func (k *knownLinks) add(link string, l knownLink) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.m == nil || len(k.m) >= maxKnownLinks {
		k.m = make(map[string]knownLink)
	}
	k.m[link] = l
}

func (k *knownLinks) forget(link string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.m, link)
}

// resolve returns the layer ID that each link of a chain stands for, as the function resolve does.
func (d *Driver) resolve(links []string) ([]string, error) {
	if len(links) == 0 {
		return nil, nil
	}
	known := d.known.lookup(links)
	if err := d.follow(links, known); err != nil {
		return nil, err
	}
	ids := make([]string, len(known))
	for i := range known {
		ids[i] = known[i].id
	}
	return ids, nil
}

// follow follows those links strictly that do not lead where they did, and puts into known
// where they lead.
func (d *Driver) follow(links []string, known []knownLink) error {
	homefd, err := sys.OpenRoot(d.home)
	if err != nil {
		return err
	}
	defer func() { _ = sys.Close(homefd) }()
	lfd, err := sys.OpenDirat(homefd, linkDir)
	if err != nil {
		return corrupt("%s: %w", linkDir, err)
	}
	defer func() { _ = sys.Close(lfd) }()
	for i, link := range links {
		if known[i].still(lfd) {
			continue
		}
		if known[i], err = resolveLink(homefd, lfd, link); err != nil {
			d.known.forget(link)
			return err
		}
		d.known.add(link, known[i])
	}
	return nil
}

// chain is a layer's link and those below it, as a mount needs them: each is checked just
// before the kernel follows it, while what that takes is at hand in the processor's caches.
type chain struct {
	d     *Driver
	lfd   int // l/, open
	links []string
	known []knownLink
}

// openChain takes up the links. The caller closes it.
func (d *Driver) openChain(links []string) (*chain, error) {
	lfd, err := sys.OpenRoot(d.home + "/" + linkDir)
	if err != nil {
		return nil, corrupt("%s: %w", linkDir, err)
	}
	return &chain{d: d, lfd: lfd, links: links, known: d.known.lookup(links)}, nil
}

func (c *chain) close() { _ = sys.Close(c.lfd) }

// check checks one link.
func (c *chain) check(i int) error {
	if c.known[i].still(c.lfd) {
		return nil
	}
	return c.d.follow(c.links[i:i+1], c.known[i:i+1])
}
