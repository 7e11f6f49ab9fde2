//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// ownLinks returns the links in l/ that lead to the layer. Mostly that is the one its link
// file names; if that file is damaged, l/ is searched.
func (s *staging) ownLinks(l *layer) ([]string, error) {
	lfd, err := s.links()
	if err != nil {
		return nil, err
	}
	var failed error
	leads := func(link string) bool {
		target, err := sys.Readlinkat(lfd, link)
		if exhausted(err) {
			failed = err // it may lead to the layer, and children may need it
		}
		return err == nil && (target == linkTarget(l.id) || target == incompleteTarget(l.id))
	}
	if link, err := l.link(); err == nil {
		if leads(link) {
			return []string{link}, nil
		}
	}
	var links []string
	err = sys.ReadNames(lfd, func(name string) bool {
		if linkid.Valid(name) && leads(name) {
			links = append(links, name)
		}
		return true
	})
	return links, errors.Join(err, failed)
}

// checkChildless returns ErrLayerInUse if another layer has this one in its chain. The layer's list of children answers
// that if it is sealed; if not, as with what Docker made, all layers are looked at.
// The caller has the layer to itself.
func (d *Driver) checkChildless(s *staging, l *layer, links []string) error {
	listfd, odd, err := l.openList()
	if err != nil {
		return err
	}
	defer func() {
		if listfd >= 0 {
			_ = sys.Close(listfd) // opened for reading: nothing can be lost
		}
	}()
	whole, err := d.listsAll(l, listfd)
	if err != nil {
		return err
	}
	if whole && listfd < 0 {
		return nil // the usual layer without a child costs four calls
	}
	// Chains may hold the link that its file names although it is lost in l/.
	if own, err := l.link(); err == nil && !slices.Contains(links, own) {
		links = append(slices.Clone(links), own)
	}
	if len(links) == 0 {
		return nil // no chain can hold it
	}
	var child string
	if listfd >= 0 {
		child, odd, err = s.listedChild(l, listfd, links)
	}
	if err == nil && child == "" && (odd || !whole) {
		child, err = d.lookAtAll(s, l, links)
	}
	switch {
	case err != nil && child != "":
		return fmt.Errorf("whether layer %s is a child: %w", child, err)
	case err != nil:
		return err
	case child != "":
		return fmt.Errorf("%w: layer %s is built on it", ErrLayerInUse, child)
	}
	return nil
}

// chainHas reports whether the lower file of id names one of links. What the file says
// beside is not looked at: a damaged one may still be mended, and needs its parents then.
func (s *staging) chainHas(id string, links []string) (bool, error) {
	data, err := sys.ReadFileAt(s.homefd, id+"/"+lowerName, maxLowerFile)
	switch {
	case err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP || errors.Is(err, sys.ErrNotRegular):
		return false, nil
	case err != nil:
		return false, err
	}
	for _, link := range links {
		if strings.Contains(string(data), link) {
			return true, nil
		}
	}
	return false, nil
}
