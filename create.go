//go:build linux

package overlay2

import (
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// Create makes an empty layer that is to hold a diff: one on top of parent, or a base
// layer if parent is "". Storage options are an error; they are for CreateReadWrite.
//
// The layer appears whole or, on an error, not at all. From then on the parent is
// committed: each later Get of it is read-only. A mount of it for writing that is there stays so. Put it
// first: what is written beneath a child that is mounted the child may show or not.
func (d *Driver) Create(id, parent string, opts *CreateOpts) error {
	if opts != nil && len(opts.StorageOpt) > 0 {
		return layerErr("create", id, fmt.Errorf("%w: storage options are for read-write layers only", ErrInvalidOption))
	}
	return layerErr("create", id, d.create(id, parent, limits{}, createPrefix))
}

// CreateReadWrite makes an empty layer that is to be written through Get. It takes
// limits as storage options, and the Driver's defaults apply.
func (d *Driver) CreateReadWrite(id, parent string, opts *CreateOpts) error {
	l, err := parseStorageOpt(opts, limits{size: d.opts.Size, inodes: d.opts.Inodes})
	if err == nil {
		err = d.create(id, parent, l, readWritePrefix)
	}
	return layerErr("create", id, err)
}

func (d *Driver) create(id, parent string, limit limits, kind string) (err error) {
	if err := checkID(id); err != nil {
		return err
	}
	if limit != (limits{}) && !d.hasQuota() {
		return d.noQuota()
	}
	if parent == id {
		return fmt.Errorf("%w: a layer cannot be its own parent", ErrInvalidID)
	}
	state, unlock := d.layers.lockChild(id, parent)
	defer unlock()
	s, err := d.openStaging()
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.checkFree(id); err != nil {
		return err
	}
	if err := d.endUses(state); err != nil { // of one that others have removed
		return err
	}
	n := newLayer{d: d, s: s, id: id, limit: limit, entry: kind, readWrite: kind == readWritePrefix}
	if parent != "" {
		p, err := d.openParent(parent)
		if err != nil {
			return fmt.Errorf("parent %s: %w", parent, err)
		}
		defer p.close()
		if n.lowers, err = d.parentChain(s, p); err != nil {
			return fmt.Errorf("parent %s: %w", parent, p.gone(err))
		}
		n.parent = p
	}
	return n.make()
}

// checkFree returns ErrLayerExists if the home has something of this name.
func (s *staging) checkFree(id string) error {
	var st unix.Stat_t
	switch err := sys.Fstatat(s.homefd, id, &st); err {
	case unix.ENOENT:
		return nil
	case nil:
		return ErrLayerExists
	default:
		return err
	}
}

// openParent opens a layer that is to get a child. Until the layer is closed no other
// process removes it; whether one has in the meantime parentChain finds out.
func (d *Driver) openParent(id string) (*layer, error) {
	p, err := openLayer(d.home, id)
	if err != nil {
		return nil, err
	}
	err = sys.Flock(p.fd, unix.LOCK_SH)
	if err == nil {
		err = p.gone(errors.Join(p.checkWhole(), p.checkDiff(), d.checkSynced(p)))
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// parentChain returns the links that a child of p has below it, and checks that p is there and that they lead to layers.
func (d *Driver) parentChain(s *staging, p *layer) ([]string, error) {
	own, err := p.link()
	if err != nil {
		return nil, err
	}
	above, err := p.lowers()
	if err != nil {
		return nil, err
	}
	links := append([]string{own}, above...)
	if len(links) > d.maxDepth {
		return nil, fmt.Errorf("%w: %d below, at most %d", ErrTooDeep, len(links), d.maxDepth)
	}
	lfd, err := s.links()
	if err != nil {
		return nil, err
	}
	here, base := d.known.surely(lfd, p.id, links)
	if !here {
		if err := p.checkHere(); err != nil { // it may have been removed between the open and the lock
			return nil, err
		}
		k, err := resolveLink(s.homefd, lfd, own)
		if err != nil {
			return nil, err
		}
		if k.id != p.id {
			return nil, corrupt("%s: %s is the link of layer %s", linkName, own, k.id)
		}
	}
	if base {
		return links, nil
	}
	return links, checkEnd(lfd, above)
}

// newLayer is a layer being made in the staging directory.
type newLayer struct {
	d         *Driver
	s         *staging
	id        string
	parent    *layer
	lowers    []string
	limit     limits
	name      string // in staging
	link      string
	entry     string    // how it is noted until it is on the disk: createPrefix or readWritePrefix
	listed    bool      // among its parent's children
	batch     *batch    // that notes the layer until it is on the disk; nil if it is not noted
	readWrite bool      // it is probably mounted soon
	diff      sys.Ident // of its diff
}

// make makes the layer and lets it appear by one rename. On an error nothing is left.
func (n *newLayer) make() (err error) {
	n.name = newPrefix + rand.Text()
	if n.link, err = linkid.New(); err != nil {
		return err
	}
	if err := sys.Mkdirat(n.s.fd, n.name, 0o710); err != nil {
		return fmt.Errorf("mkdir: %w", err)
	}
	defer func() {
		made := n.id
		if n.d.opts.Durability == DurabilityStrict {
			made = syncNothing // it is on the disk
		}
		if err != nil {
			made = syncNothing
			err = errors.Join(err, n.undo())
		}
		if n.batch != nil {
			n.d.leave(n.batch, made, createDelay)
		}
	}()
	if err := n.d.limitNew(n.name, n.limit); err != nil {
		return err
	}
	if err := n.fill(); err != nil {
		return err
	}
	if err := n.record(); err != nil {
		return err
	}
	if err := n.makeLink(); err != nil {
		return err
	}
	if n.parent != nil {
		n.listed = true
		if err := n.d.enlist(n.parent, n.link, n.id); err != nil {
			return fmt.Errorf("parent %s: %w", n.parent.id, err)
		}
	}
	if err := n.appear(); err != nil {
		return err
	}
	if n.readWrite && n.parent != nil {
		n.d.known.add(n.link, knownLink{id: n.id, name: sys.MakeName(n.link), diff: n.diff})
	}
	return nil
}

// record notes the layer as not on the disk yet, as the Driver's durability asks for.
func (n *newLayer) record() (err error) {
	switch n.d.opts.Durability {
	case DurabilityOff:
		return nil
	case DurabilityStrict:
		n.entry = readWritePrefix // it will not be lost, but its link may be left
	}
	parentLink := noParent
	if len(n.lowers) > 0 {
		parentLink = n.lowers[0]
	}
	n.entry += n.link
	n.batch, err = n.d.recordCreate(n.s, n.entry, parentLink)
	return err
}

// appear lets the layer appear, by one rename.
func (n *newLayer) appear() error {
	strict := n.d.opts.Durability == DurabilityStrict
	if strict {
		if err := n.d.syncfs(n.s.fd); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
	}
	err := sys.RenameNoReplace(n.s.fd, n.name, n.s.homefd, n.id)
	if err == unix.EEXIST || err == unix.ENOTEMPTY {
		return ErrLayerExists // another process was quicker
	}
	if err != nil {
		return fmt.Errorf("rename: %w", err)
	}
	if strict {
		if err := n.d.synced(sys.Fsync(n.s.homefd)); err != nil {
			return errors.Join(fmt.Errorf("sync: %w", err), unix.Renameat(n.s.homefd, n.id, n.s.fd, n.name))
		}
	}
	return nil
}

// fill makes what lies in the layer's directory.
func (n *newLayer) fill() (err error) {
	fd, err := sys.OpenDirat(n.s.fd, n.name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sys.Close(fd)) }()
	if n.d.rootGID != 0 {
		if err := unix.Fchown(fd, -1, int(n.d.rootGID)); err != nil {
			return fmt.Errorf("chown: %w", err)
		}
	}
	if err := n.makeDiff(fd); err != nil {
		return fmt.Errorf("%s: %w", diffName, err)
	}
	if err := sys.WriteFileAt(fd, linkName, []byte(n.link), 0o644); err != nil {
		return fmt.Errorf("%s: %w", linkName, err)
	}
	if err := sys.Symlinkat(n.d.seal(childless(n.diff)), fd, listedName); err != nil {
		return fmt.Errorf("%s: %w", listedName, err)
	}
	if n.parent == nil {
		return nil
	}
	if err := sys.WriteFileAt(fd, lowerName, []byte(encodeLower(n.lowers)), 0o644); err != nil {
		return fmt.Errorf("%s: %w", lowerName, err)
	}
	if err := sys.Mkdirat(fd, workName, 0o700); err != nil {
		return fmt.Errorf("%s: %w", workName, err)
	}
	return n.d.chownRoot(fd, workName)
}

// makeDiff makes the diff directory. It has its parent's metadata, because overlayfs shows the
// uppermost layer's root: otherwise a layer that changes one file would reset the mode of "/".
func (n *newLayer) makeDiff(fd int) error {
	if n.parent == nil {
		if err := sys.Mkdirat(fd, diffName, 0o755); err != nil {
			return err
		}
		st, err := sys.StatDir(fd, diffName)
		if err != nil {
			return err
		}
		n.diff = st.Ident
		if st.UID == n.d.rootUID && st.GID == n.d.rootGID {
			return nil
		}
		// Remapped, or a home with a group for all that is made in it.
		return unix.Fchownat(fd, diffName, int(n.d.rootUID), int(n.d.rootGID), unix.AT_SYMLINK_NOFOLLOW)
	}
	if err := sys.MkdiratMasked(fd, diffName, 0o755); err != nil {
		return err
	}
	src, err := sys.OpenDirat(n.parent.fd, diffName)
	if err != nil {
		return err
	}
	defer func() { _ = sys.Close(src) }()
	dst, err := sys.OpenDirat(fd, diffName)
	if err != nil {
		return err
	}
	n.diff, n.parent.diff, err = sys.CopyDirMetadata(dst, src)
	return errors.Join(err, sys.Close(dst))
}

// makeLink makes the layer's link in l/, which leads nowhere until the layer appears.
func (n *newLayer) makeLink() error {
	lfd, err := n.s.links()
	if err == nil {
		err = sys.Symlinkat(linkTarget(n.id), lfd, n.link)
	}
	if err != nil {
		return fmt.Errorf("%s/%s: %w", linkDir, n.link, err)
	}
	return nil
}

// undo removes what make has made.
func (n *newLayer) undo() error {
	var noted error
	if n.batch != nil {
		noted = ignoreAbsent(sys.Unlinkat(n.batch.fd, n.entry, 0))
	}
	if n.listed {
		noted = errors.Join(noted, n.parent.unlistFrom(n.link, n.id))
	}
	return errors.Join(n.s.removeDangling(n.link), n.d.unlimit(n.name), sys.RemoveAllAt(n.s.fd, n.name), noted)
}
