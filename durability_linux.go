//go:build linux

package overlay2

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// recoverUnsynced deals with layers that were not on the disk yet when the process that made
// them ended. If the machine ran on, they are synced now. If power was cut, the files of
// those that were made are written again, and those that were filled become incomplete.
func (d *Driver) recoverUnsynced() (err error) {
	s, err := d.openStaging()
	if err != nil {
		return err
	}
	defer s.close()
	if d.instance, err = sys.FSInstance(s.fd); err != nil {
		return err
	}
	var names []string
	if err := sys.ReadNames(s.fd, func(name string) bool {
		if strings.HasPrefix(name, unsyncedPrefix) {
			names = append(names, name)
		}
		return true
	}); err != nil {
		return fmt.Errorf("%s: %w", stagingDir, err)
	}
	r := replay{d: d, s: s, lfd: -1, parents: map[string]string{}}
	defer func() { err = errors.Join(err, r.close()) }()
	for _, name := range names {
		same := strings.HasPrefix(name, unsyncedPrefix+d.instance+"-")
		fd, err := s.takeUnsynced(name, same)
		switch {
		case err != nil:
			return fmt.Errorf("%s/%s: %w", stagingDir, name, err)
		case fd < 0:
			continue
		}
		b := &batch{name: name, fd: fd, whole: true}
		if !same {
			r.batches = append(r.batches, b)
			continue
		}
		if err := r.restoreApplied(b); err != nil {
			return errors.Join(err, sys.Close(fd))
		}
		d.syncer.mu.Lock()
		d.syncer.adopted = append(d.syncer.adopted, b)
		d.schedule(applyDelay)
		d.syncer.mu.Unlock()
	}
	if len(r.batches) == 0 {
		return nil
	}
	return r.run()
}

// takeUnsynced opens and locks a record that a process has left. It returns -1 if one that
// lives owns it, or has dealt with it meanwhile.
func (s *staging) takeUnsynced(name string, same bool) (fd int, err error) {
	if fd, err = sys.OpenDirat(s.fd, name); err != nil {
		return -1, ignoreAbsent(err)
	}
	defer func() {
		if err != nil {
			_ = sys.Close(fd)
			fd = -1
			if err == unix.EWOULDBLOCK || err == unix.ENOENT {
				err = nil
			}
		}
	}()
	how := unix.LOCK_EX
	if same {
		how |= unix.LOCK_NB
	}
	// A record from before a power cut is held by another New that is mending: that is awaited.
	if err := sys.Flock(fd, how); err != nil {
		return fd, err
	}
	var mine, there unix.Stat_t
	if err := sys.Fstat(fd, &mine); err != nil {
		return fd, err
	}
	if err := sys.Fstatat(s.fd, name, &there); err != nil {
		return fd, err
	}
	if mine.Ino != there.Ino {
		return fd, unix.ENOENT
	}
	return fd, nil
}

// replay mends a home after a power cut, by the records of what was not on the disk. Each
// step may be repeated: another power cut may undo it.
type replay struct {
	d       *Driver
	s       *staging
	lfd     int
	batches []*batch
	parents map[string]string // the parent's link by the link of a layer that was made
	created []string          // links of layers that were made to be filled
	lost    []string          // IDs of layers that were filled, or should have been
}

func (r *replay) close() (err error) {
	for _, b := range r.batches {
		err = errors.Join(err, sys.Close(b.fd))
	}
	if r.lfd >= 0 {
		err = errors.Join(err, sys.Close(r.lfd))
	}
	return err
}

func (r *replay) run() (err error) {
	for _, b := range r.batches {
		if err := r.readBatch(b); err != nil {
			return fmt.Errorf("%s/%s: %w", stagingDir, b.name, err)
		}
	}
	for link := range r.parents {
		if err := r.mend(link); err != nil {
			return fmt.Errorf("%s/%s: %w", linkDir, link, err)
		}
	}
	for _, b := range r.batches {
		if err := r.loseApplied(b); err != nil {
			return err
		}
	}
	for _, link := range r.created {
		if err := r.loseLayer(link, func(l *layer) error { return r.loseCreated(l, link) }); err != nil {
			return err
		}
	}
	if len(r.lost) > 0 {
		r.d.log.WithField("layers", r.lost).Warn("overlay2: content was not on the disk when the machine stopped: incomplete")
	}
	if err := r.d.syncfs(r.s.fd); err != nil {
		return err
	}
	return r.d.dropBatches(r.s, r.batches)
}

// readBatch notes the layers that were made.
func (r *replay) readBatch(b *batch) error {
	var failed error
	err := sys.ReadNames(b.fd, func(name string) bool {
		link, create := strings.CutPrefix(name, createPrefix)
		if !create {
			link, _ = strings.CutPrefix(name, readWritePrefix)
		}
		if !linkid.Valid(link) {
			return true
		}
		if create {
			r.created = append(r.created, link)
		}
		r.parents[link], failed = sys.Readlinkat(b.fd, name)
		return failed == nil
	})
	return errors.Join(err, failed)
}

// open opens the layer that a link stands for; nil if there is none.
func (r *replay) open(link string) (_ *layer, err error) {
	if r.lfd < 0 {
		if r.lfd, err = sys.OpenDirat(r.s.homefd, linkDir); err != nil {
			return nil, fmt.Errorf("%s: %w", linkDir, err)
		}
	}
	target, err := sys.Readlinkat(r.lfd, link)
	if err != nil {
		return nil, ignoreAbsent(err)
	}
	id, _ := parseLinkTarget(target)
	if id == "" {
		return nil, nil // tampered with: Check reports it
	}
	l, err := openLayer(r.d.home, id)
	if errors.Is(err, ErrLayerNotFound) || errors.Is(err, ErrCorrupt) {
		return nil, nil
	}
	return l, err
}

// mend writes the files of a layer that was made again, if they have no content. Its parent comes first.
func (r *replay) mend(link string) error {
	parentLink, ok := r.parents[link]
	if !ok {
		return nil // not ours to mend, or done
	}
	delete(r.parents, link)
	if err := r.mend(parentLink); err != nil {
		return err
	}
	l, err := r.open(link)
	if err != nil {
		return err
	}
	if l == nil {
		return r.s.removeDangling(link) // it never appeared
	}
	defer l.close()
	switch own, err := l.link(); {
	case exhausted(err):
		return fmt.Errorf("%s: %w", l.id, err) // it may be another layer's
	case err != nil:
		if err := r.rewrite(l, linkName, link); err != nil {
			return err
		}
	case own != link:
		return r.s.removeDangling(link) // the ID is another layer's now
	}
	if parentLink == noParent {
		return nil
	}
	if links, err := l.lowers(); err == nil && len(links) > 0 {
		return nil
	}
	p, err := r.open(parentLink)
	if err != nil || p == nil {
		return err
	}
	defer p.close()
	above, err := p.lowers()
	if exhausted(err) {
		return fmt.Errorf("%s: %w", p.id, err) // the record must stay
	}
	if err != nil {
		return nil // the parent is damaged: Check reports both
	}
	return r.rewrite(l, lowerName, encodeLower(append([]string{parentLink}, above...)))
}

// rewrite replaces a file of a layer, by a rename.
func (r *replay) rewrite(l *layer, name, content string) error {
	tmp := newPrefix + rand.Text()
	err := sys.WriteFileAt(r.s.fd, tmp, []byte(content), 0o644)
	if err == nil {
		err = unix.Renameat(r.s.fd, tmp, l.fd, name)
	}
	if err == unix.EXDEV { // a layer with a project of its own takes nothing from elsewhere
		err = errors.Join(sys.Unlinkat(r.s.fd, tmp, 0), rewriteWithin(l, name, content))
		if (errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOSPC)) && r.d.usedUp(l) {
			// The home is of use without it, and Check reports it.
			r.d.log.WithError(err).WithField("layer", l.id).Warnf("overlay2: %s was not on the disk when the machine stopped", name)
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("%s/%s: %w", l.id, name, err)
	}
	return nil
}

// rewriteWithin is rewrite by a file in the layer's own directory.
func rewriteWithin(l *layer, name, content string) error {
	tmp := name + newSuffix
	if err := ignoreAbsent(sys.Unlinkat(l.fd, tmp, 0)); err != nil {
		return err
	}
	if err := sys.WriteFileAt(l.fd, tmp, []byte(content), 0o644); err != nil {
		return err
	}
	return unix.Renameat(l.fd, tmp, l.fd, name)
}

// loseApplied makes the layers incomplete that were filled. Their links lead nowhere from then
// on, so that the layers above cannot be used either.
func (r *replay) loseApplied(b *batch) error {
	return r.eachApplied(b, func(link string) error {
		return r.loseLayer(link, func(l *layer) error { return r.lose(b, l, link) })
	})
}

// eachApplied calls f with the link of each layer that was filled.
func (r *replay) eachApplied(b *batch, f func(link string) error) error {
	var links []string
	if err := sys.ReadNames(b.fd, func(name string) bool {
		if link, ok := strings.CutPrefix(name, applyPrefix); ok && linkid.Valid(link) {
			links = append(links, link)
		}
		return true
	}); err != nil {
		return fmt.Errorf("%s/%s: %w", stagingDir, b.name, err)
	}
	for _, link := range links {
		if err := f(link); err != nil {
			return err
		}
	}
	return nil
}

// loseLayer calls lose with the layer of a link, if there is one.
func (r *replay) loseLayer(link string, lose func(*layer) error) error {
	return r.ownLayer(link, func(l *layer) error {
		r.lost = append(r.lost, l.id)
		return lose(l)
	})
}

// ownLayer calls f with the layer of a link, if there is one and the link is its own.
func (r *replay) ownLayer(link string, f func(*layer) error) error {
	l, err := r.open(link)
	if err != nil || l == nil {
		return err
	}
	defer l.close()
	own, err := l.link()
	if exhausted(err) {
		return fmt.Errorf("%s: %w", l.id, err) // the record must stay, or the layer would be taken for whole
	}
	if err != nil || own != link {
		return nil // the ID is another layer's now
	}
	if err := f(l); err != nil {
		return fmt.Errorf("%s: %w", l.id, err)
	}
	return nil
}

// loseCreated makes a layer incomplete that was made, and may have been filled without a trace.
func (r *replay) loseCreated(l *layer, link string) error {
	if err := r.s.setLink(link, incompleteTarget(l.id)); err != nil {
		return err
	}
	if mark, err := l.incomplete(); err != nil || mark != "" {
		return err
	}
	return l.markIncomplete()
}

// lose makes a layer incomplete that was filled.
func (r *replay) lose(b *batch, l *layer, link string) error {
	if err := r.s.setLink(link, incompleteTarget(l.id)); err != nil {
		return err
	}
	entry := applyPrefix + link
	err := unix.Renameat(b.fd, entry, l.fd, incompleteName)
	if err == unix.EXDEV { // a layer with a project id of its own
		var mark string
		if mark, err = sys.Readlinkat(b.fd, entry); err == nil {
			err = ignoreAbsent(sys.Unlinkat(l.fd, incompleteName, 0))
		}
		if err == nil {
			err = sys.Symlinkat(mark, l.fd, incompleteName)
		}
	}
	return err
}

// leadsNowhere reports whether the layer's content was lost when power was cut.
func (s *staging) leadsNowhere(l *layer, links []string) (bool, error) {
	if len(links) != 1 {
		return false, nil
	}
	target, err := sys.Readlinkat(s.homefd, linkDir+"/"+links[0])
	return target == incompleteTarget(l.id), err
}

// restoreApplied restores the links of layers that were filled by a process that ended before it had.
func (r *replay) restoreApplied(b *batch) error {
	return r.eachApplied(b, func(link string) error {
		return r.ownLayer(link, func(l *layer) error {
			if mark, err := l.incomplete(); err != nil || mark != "" {
				return err
			}
			turned, err := r.s.leadsNowhere(l, []string{link})
			if err != nil || !turned {
				return err
			}
			return r.s.setLink(link, linkTarget(l.id))
		})
	})
}

// setLink replaces a link in l/, by a rename.
func (s *staging) setLink(link, target string) error {
	tmp := newPrefix + rand.Text()
	err := sys.Symlinkat(target, s.fd, tmp)
	if err == nil {
		if err = unix.Renameat(s.fd, tmp, s.homefd, linkDir+"/"+link); err != nil {
			err = errors.Join(err, sys.Unlinkat(s.fd, tmp, 0))
		}
	}
	if err != nil {
		return fmt.Errorf("%s/%s: %w", linkDir, link, err)
	}
	return nil
}
