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

// lookup appends what is known of each link to dst, an empty knownLink if nothing is.
func (k *knownLinks) lookup(dst []knownLink, links []string) []knownLink {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, link := range links {
		dst = append(dst, k.m[link])
	}
	return dst
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
	lfd, err := sys.OpenRoot(d.home + "/" + linkDir)
	if err != nil {
		return nil, corrupt("%s: %w", linkDir, err)
	}
	defer func() { _ = sys.Close(lfd) }()
	homefd := -1
	defer func() {
		if homefd >= 0 {
			_ = sys.Close(homefd)
		}
	}()
	known := d.known.lookup(make([]knownLink, 0, len(links)), links)
	ids := make([]string, len(links))
	for i, link := range links {
		if k := &known[i]; k.id != "" {
			if now, err := sys.IdentDir(lfd, k.name); err == nil && now.Same(k.diff) {
				ids[i] = k.id
				continue
			}
			d.known.forget(link)
		}
		if homefd < 0 {
			if homefd, err = sys.OpenRoot(d.home); err != nil {
				return nil, err
			}
		}
		k, err := resolveLink(homefd, lfd, link)
		if err != nil {
			return nil, err
		}
		d.known.add(link, k)
		ids[i] = k.id
	}
	return ids, nil
}
