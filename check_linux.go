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

// checker collects the problems of a home.
type checker struct {
	d        *Driver
	homefd   int
	lfd      int
	links    map[string]string // link file's content by layer ID
	lowers   map[string][]string
	problems []Problem
}

// Check reads the whole home and returns all that is not as docs/format.md says, sorted by
// path; none for a home in order. It changes nothing. Layers that are made or removed
// meanwhile may be reported.
//
// The error is of reading the home itself.
func (d *Driver) Check() ([]Problem, error) {
	c := checker{d: d, homefd: -1, lfd: -1, links: map[string]string{}, lowers: map[string][]string{}}
	err := c.run()
	for _, fd := range []int{c.homefd, c.lfd} {
		if fd >= 0 {
			err = errors.Join(err, sys.Close(fd))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("check %s: %w", d.home, err)
	}
	slices.SortStableFunc(c.problems, func(a, b Problem) int { return strings.Compare(a.Path, b.Path) })
	return c.problems, nil
}

func (c *checker) run() (err error) {
	if c.homefd, err = sys.OpenRoot(c.d.home); err != nil {
		return err
	}
	if c.lfd, err = sys.OpenDirat(c.homefd, linkDir); err != nil {
		return fmt.Errorf("%s: %w", linkDir, err)
	}
	if err := c.eachName(c.homefd, c.checkHomeEntry); err != nil {
		return err
	}
	c.checkChains()
	if err := c.eachName(c.lfd, c.checkLinkEntry); err != nil {
		return fmt.Errorf("%s: %w", linkDir, err)
	}
	return c.checkStaging()
}

// eachName calls f for each entry of the open directory.
func (c *checker) eachName(fd int, f func(name string)) error {
	return sys.ReadNames(fd, func(name string) bool { f(name); return true })
}

func (c *checker) report(id, path string, err error) {
	c.problems = append(c.problems, Problem{ID: id, Path: path, Err: err})
}

// checkHomeEntry looks at one entry of the home.
func (c *checker) checkHomeEntry(name string) {
	if name == linkDir || name == stagingDir {
		return
	}
	if name == "backingFsBlockDev" { // Docker's device node for quotas
		return
	}
	l, err := openLayer(c.d.home, name)
	if err != nil {
		c.report("", name, err)
		return
	}
	defer l.close()
	c.checkLayer(l)
}

// checkLayer looks at the files of one layer.
func (c *checker) checkLayer(l *layer) {
	fail := func(name string, err error) {
		if err != nil {
			c.report(l.id, l.id+"/"+name, err)
		}
	}
	fail(diffName, l.checkDiff())
	if link, err := l.link(); err != nil {
		fail(linkName, err)
	} else {
		c.links[l.id] = link
		target, err := sys.Readlinkat(c.lfd, link)
		if err != nil {
			fail(linkName, corrupt("%s/%s: %w", linkDir, link, err))
		} else if incomplete, _ := l.has(incompleteName); target != linkTarget(l.id) && !(incomplete && target == incompleteTarget(l.id)) {
			fail(linkName, corrupt("%s/%s leads to %q", linkDir, link, target))
		}
	}
	lowers, err := l.lowers()
	fail(lowerName, err)
	c.lowers[l.id] = lowers
	if len(lowers) > 0 {
		if err := sys.IsDirat(l.fd, workName); err != nil {
			fail(workName, corrupt("%w", err))
		}
	}
	if incomplete, err := l.has(incompleteName); incomplete || err != nil {
		fail(incompleteName, errors.Join(ErrIncomplete, err))
	}
	c.checkMerged(l)
}

// checkMerged reports a mount point on which nothing is mounted.
func (c *checker) checkMerged(l *layer) {
	has, err := l.has(mergedName)
	if err == nil && !has {
		return
	}
	mounted := false
	if err == nil {
		mounted, err = l.mounted()
	}
	switch {
	case err != nil:
		c.report(l.id, l.id+"/"+mergedName, err)
	case !mounted:
		c.report(l.id, l.id+"/"+mergedName, corrupt("nothing is mounted there"))
	}
}

// checkChains looks at the chain of each layer: each link leads to a layer, a parent is
// committed, and its own chain is the rest of the child's.
func (c *checker) checkChains() {
	owners := make(map[string]string, len(c.links))
	for id, link := range c.links {
		if other, twice := owners[link]; twice {
			c.report(id, id+"/"+linkName, corrupt("layer %s has the same link %s", other, link))
		}
		owners[link] = id
	}
	for id, lowers := range c.lowers {
		for _, link := range lowers {
			if _, ok := owners[link]; !ok {
				c.report(id, id+"/"+lowerName, corrupt("no layer has the link %s", link))
			}
		}
		if len(lowers) == 0 {
			continue
		}
		parent, ok := owners[lowers[0]]
		if !ok {
			continue
		}
		if !slices.Equal(c.lowers[parent], lowers[1:]) {
			c.report(id, id+"/"+lowerName, corrupt("not the link and the chain of its parent %s", parent))
		}
		var st unix.Stat_t
		if err := sys.Fstatat(c.homefd, parent+"/"+committedName, &st); err != nil {
			c.report(parent, parent+"/"+committedName, corrupt("has child %s: %w", id, err))
		}
	}
}

// checkLinkEntry reports a link that is no layer's.
func (c *checker) checkLinkEntry(name string) {
	path := linkDir + "/" + name
	if !linkid.Valid(name) {
		c.report("", path, corrupt("not the name of a link"))
		return
	}
	target, err := sys.Readlinkat(c.lfd, name)
	if err != nil {
		c.report("", path, corrupt("%w", err))
		return
	}
	id, err := parseLinkTarget(target)
	if id == "" { // that a layer is incomplete is reported with its marker
		c.report("", path, err)
		return
	}
	if link, ok := c.links[id]; !ok {
		c.report(id, path, corrupt("leads to layer %s, which is not there", id))
	} else if link != name {
		c.report(id, path, corrupt("layer %s has the link %s", id, link))
	}
}

// checkStaging reports what a crash left in the staging directory: layers that never
// appeared, unless some process holds the lock and may be making them. Trash is in order: it
// waits for deletion, here or in another process, and the next New goes on with it.
func (c *checker) checkStaging() error {
	fd, err := sys.OpenDirat(c.homefd, stagingDir)
	if err != nil {
		return ignoreAbsent(err) // a home that only Docker has used
	}
	defer func() { _ = sys.Close(fd) }()
	alone := sys.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil
	return c.eachName(fd, func(name string) {
		if alone && !strings.HasPrefix(name, trashPrefix) && !strings.HasPrefix(name, unsyncedPrefix) {
			c.report("", stagingDir+"/"+name, corrupt("left by a crash"))
		}
	})
}
