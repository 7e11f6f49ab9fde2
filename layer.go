//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// Names of the home and of a layer's directory. See docs/format.md.
const (
	linkDir        = "l"
	stagingDir     = "staging"
	diffName       = "diff"
	workName       = "work"
	mergedName     = "merged"
	linkName       = "link"
	lowerName      = "lower"
	committedName  = "committed"
	incompleteName = "incomplete"
	// deviceName is Docker's device node for quotas, in the home.
	deviceName = "backingFsBlockDev"
	// lostFoundName is the directory of ext4 for what its fsck finds, in a home that is a filesystem's root.
	lostFoundName = "lost+found"
	// newSuffix and dockerTmpPrefix are of names under which a layer's files are written: ours, and Docker's with digits in the end.
	newSuffix       = ".new"
	dockerTmpPrefix = ".tmp-"
)

const (
	// linkPrefix begins each element of a lower file.
	linkPrefix = linkDir + "/"
	// maxLowers is the kernel's limit (OVL_MAX_STACK, fs/overlayfs/params.h).
	maxLowers = 500
	// maxLowerFile is the length of the longest lower file in bytes.
	maxLowerFile = maxLowers * (len(linkPrefix) + linkid.Length + 1)
	// shortLowerFile is more than a chain has that Docker can mount, of 128 layers: it is read by one call.
	shortLowerFile = 128*(len(linkPrefix)+linkid.Length+1) + 1
	// maxIDLen is NAME_MAX: the ID is a directory's name.
	maxIDLen = 255
)

// checkID returns ErrInvalidID unless id can be the name of a layer's directory.
func checkID(id string) error {
	switch {
	case id == "":
		return fmt.Errorf("%w: empty", ErrInvalidID)
	case id == "." || id == "..", strings.ContainsAny(id, "/\x00"):
		return fmt.Errorf("%w: not one path element", ErrInvalidID)
	case len(id) > maxIDLen:
		return fmt.Errorf("%w: %d bytes, more than %d", ErrInvalidID, len(id), maxIDLen)
	}
	switch id {
	case linkDir, stagingDir, diffName, workName, mergedName, linkName, lowerName, committedName, incompleteName, digestsName, deviceName:
		return fmt.Errorf("%w: a name of the driver's own", ErrInvalidID)
	}
	return nil
}

// encodeLower returns the content of a lower file for a chain of links, nearest first.
func encodeLower(links []string) string {
	var b strings.Builder
	for i, link := range links {
		if i > 0 {
			b.WriteByte(':')
		}
		b.WriteString(linkPrefix)
		b.WriteString(link)
	}
	return b.String()
}

// parseLower returns the links in a lower file. Anything but "l/LINK:l/LINK...", an
// empty file too, is ErrCorrupt: an empty or absolute element would mount the home itself or
// any directory of the host.
func parseLower(s string) ([]string, error) {
	elements := strings.Split(s, ":")
	if len(elements) > maxLowers {
		return nil, corrupt("%s: %d layers, more than %d", lowerName, len(elements), maxLowers)
	}
	links := make([]string, len(elements))
	for i, e := range elements {
		link, ok := strings.CutPrefix(e, linkPrefix)
		if !ok || !linkid.Valid(link) {
			return nil, corrupt("%s: element %d is %q, not %s and %d characters of base32", lowerName, i+1, e, linkPrefix, linkid.Length)
		}
		links[i] = link
	}
	return links, nil
}

// linkTarget returns what the symlink of a layer in l/ must hold.
func linkTarget(id string) string { return "../" + id + "/" + diffName }

// incompleteTarget returns what the symlink of a layer holds whose content was lost when power
// was cut. It leads nowhere, so that no layer above it can be mounted.
func incompleteTarget(id string) string { return "../" + id + "/" + incompleteName }

// parseLinkTarget returns the ID in the symlink of a layer. For a layer whose content was lost
// it is returned with ErrIncomplete.
func parseLinkTarget(target string) (id string, err error) {
	rest, ok := strings.CutPrefix(target, "../")
	if id, lost := strings.CutSuffix(rest, "/"+incompleteName); ok && lost && checkID(id) == nil {
		return id, fmt.Errorf("layer %s: %w", id, ErrIncomplete)
	}
	id, ok2 := strings.CutSuffix(rest, "/"+diffName)
	if !ok || !ok2 || checkID(id) != nil {
		return "", corrupt("link target is %q, not ../ID/%s", target, diffName)
	}
	return id, nil
}

// layer is the directory of a layer, open. It is read strictly: no symlink is
// followed, and a file of the wrong kind, length or content is ErrCorrupt.
type layer struct {
	home string
	id   string
	fd   int
	// kept says that it stays open, and that close only unlocks it; see keptLayer.
	kept bool
	// diff is the identity of its diff if that was looked at just now, while nobody could replace it.
	diff sys.Ident
}

// openLayer opens the layer id of home, or returns ErrLayerNotFound.
func openLayer(home, id string) (*layer, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	fd, err := sys.OpenRoot(home + "/" + id)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, ErrLayerNotFound
	case err == unix.ENOTDIR || err == unix.ELOOP:
		return nil, corrupt("%w", unix.ENOTDIR) // of a symlink the kernel says ELOOP
	case err != nil:
		return nil, err
	}
	return &layer{home: home, id: id, fd: fd}, nil
}

func (l *layer) close() {
	if l.kept && sys.Flock(l.fd, unix.LOCK_UN) == nil {
		return
	}
	_ = sys.Close(l.fd) // opened for reading: nothing can be lost
	l.kept, l.fd = false, -1
}

// path returns the host path of one of the layer's files.
func (l *layer) path(name string) string { return l.home + "/" + l.id + "/" + name }

// has reports whether the layer's directory holds name, whatever it is.
func (l *layer) has(name string) (bool, error) {
	var st unix.Stat_t
	switch err := sys.Fstatat(l.fd, name, &st); err {
	case nil:
		return true, nil
	case unix.ENOENT:
		return false, nil
	default:
		return false, fmt.Errorf("%s: %w", name, err)
	}
}

// link returns the layer's short name.
func (l *layer) link() (string, error) {
	var buf [linkid.Length + 1]byte
	data, err := sys.ReadStartAt(l.fd, linkName, buf[:])
	if err != nil {
		return "", corrupt("%s: %w", linkName, err)
	}
	if !linkid.Valid(string(data)) {
		return "", corrupt("%s: %q is not %d characters of base32", linkName, data, linkid.Length)
	}
	return string(data), nil
}

// lowers returns the links of the layer's ancestors, nearest first; none for a base layer. That is one
// without a work directory: otherwise the file is lost, and the layer must not be shown without what is below.
func (l *layer) lowers() ([]string, error) {
	lower, err := l.readLower()
	if lower == "" || err != nil {
		return nil, err
	}
	return parseLower(lower)
}

// readLower returns the content of the lower file, "" for a base layer.
func (l *layer) readLower() (string, error) {
	var buf [shortLowerFile]byte
	data, err := sys.ReadStartAt(l.fd, lowerName, buf[:])
	if len(data) == len(buf) {
		data, err = sys.ReadFileAt(l.fd, lowerName, maxLowerFile)
	}
	if err == unix.ENOENT {
		lost, err := l.has(workName)
		if lost {
			return "", corrupt("%s: %w, although there is %s", lowerName, unix.ENOENT, workName)
		}
		return "", err
	}
	if err != nil {
		return "", corrupt("%s: %w", lowerName, err)
	}
	if len(data) == 0 {
		return "", corrupt("%s: empty", lowerName)
	}
	return string(data), nil
}

// checkDiff returns an error unless diff is a directory.
func (l *layer) checkDiff() error {
	if err := sys.IsDirat(l.fd, diffName); err != nil {
		return corrupt("%s: %w", diffName, err)
	}
	return nil
}

// checkWhole returns ErrIncomplete if the last apply to the layer did not end well.
func (l *layer) checkWhole() error {
	incomplete, err := l.has(incompleteName)
	if err != nil {
		return err
	}
	if incomplete {
		return ErrIncomplete
	}
	return nil
}

// foreign returns the name of something in the layer's directory that is neither ours nor Docker's, "" if there is nothing.
func (l *layer) foreign() (foreign string, err error) {
	err = sys.ReadNames(l.fd, func(name string) bool {
		if !layerName(name) {
			foreign = name
		}
		return foreign == ""
	})
	return foreign, err
}

// layerName reports whether a layer's directory may hold something of this name.
func layerName(name string) bool {
	if tmp, ok := strings.CutPrefix(name, dockerTmpPrefix); ok {
		name = strings.TrimRight(tmp, "0123456789")
	}
	switch strings.TrimSuffix(name, newSuffix) {
	case diffName, workName, mergedName, linkName, lowerName, committedName, incompleteName, childrenName, listedName, digestsName:
		return true
	}
	return false
}

// incomplete returns what the marker of an apply that has not ended well says, "" if there is none.
func (l *layer) incomplete() (string, error) {
	switch mark, err := sys.Readlinkat(l.fd, incompleteName); err {
	case nil:
		return mark, nil
	case unix.ENOENT:
		return "", nil
	case unix.EINVAL:
		return incompleteContent, nil // no symlink: not ours, but it says enough
	default:
		return "", fmt.Errorf("%s: %w", incompleteName, err)
	}
}

// unmarkIncomplete removes the marker.
func (l *layer) unmarkIncomplete() error {
	if err := sys.Unlinkat(l.fd, incompleteName, 0); err != nil {
		return fmt.Errorf("%s: %w", incompleteName, err)
	}
	return nil
}

// resolve returns the ID that each link of a chain stands for. A link that is missing,
// leads elsewhere than to a layer, or to one whose diff is not a directory, is ErrCorrupt.
func resolve(home string, links []string) ([]string, error) {
	if len(links) == 0 {
		return nil, nil
	}
	homefd, err := sys.OpenRoot(home)
	if err != nil {
		return nil, err
	}
	defer func() { _ = sys.Close(homefd) }()
	lfd, err := sys.OpenDirat(homefd, linkDir)
	if err != nil {
		return nil, corrupt("%s: %w", linkDir, err)
	}
	defer func() { _ = sys.Close(lfd) }()
	ids := make([]string, len(links))
	for i, link := range links {
		k, err := resolveLink(homefd, lfd, link)
		if err != nil {
			return nil, err
		}
		ids[i] = k.id
	}
	return ids, nil
}

// resolveLink follows one link strictly: it returns the ID of the layer that the link stands
// for and the identity of its diff, which must be a directory there.
func resolveLink(homefd, lfd int, link string) (k knownLink, err error) {
	target, err := sys.Readlinkat(lfd, link)
	if err != nil {
		return k, corrupt("lower layer %s%s: %w", linkPrefix, link, err)
	}
	if k.id, err = parseLinkTarget(target); err != nil {
		return k, fmt.Errorf("lower layer %s%s: %w", linkPrefix, link, err)
	}
	fd, err := sys.OpenBeneath(homefd, k.id+"/"+diffName)
	if err != nil {
		return k, corrupt("lower layer %s%s: %s: %w", linkPrefix, link, target, err)
	}
	k.name = sys.MakeName(link)
	k.diff, _ = sys.IdentFd(fd) // without, the next time is no quicker
	if err := sys.Close(fd); err != nil {
		return k, err
	}
	return k, checkNamed(homefd, k.id, link)
}

// checkNamed returns ErrCorrupt if the layer says that another link is its own: then the one in l/ leads to
// the wrong layer. That the file is lost says nothing.
func checkNamed(homefd int, id, link string) error {
	var buf [linkid.Length + 1]byte
	data, err := sys.ReadStartAt(homefd, id+"/"+linkName, buf[:])
	if exhausted(err) {
		return fmt.Errorf("%s/%s: %w", id, linkName, err)
	}
	if err == nil && linkid.Valid(string(data)) && string(data) != link {
		return corrupt("lower layer %s%s: leads to %s, whose link is %s", linkPrefix, link, id, data)
	}
	return nil
}

// checkEnd returns ErrCorrupt unless the last link of a chain is a base layer's: a lower file that was cut off between
// two layers looks like a whole one. lfd is l/.
func checkEnd(lfd int, links []string) error {
	if len(links) == 0 {
		return nil
	}
	last := links[len(links)-1]
	var st unix.Stat_t
	switch err := sys.Fstatat(lfd, last+"/../"+lowerName, &st); err {
	case nil:
		return corrupt("%s: ends with %s, which is not a base layer", lowerName, last)
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP: // following the link strictly says what is wrong with it
		return nil
	default:
		return fmt.Errorf("lower layer %s%s: %w", linkPrefix, last, err)
	}
}

// diffPaths returns the host paths of the diff directories of layers.
func diffPaths(home string, ids []string) []string {
	paths := make([]string, len(ids))
	for i, id := range ids {
		paths[i] = home + "/" + id + "/" + diffName
	}
	return paths
}
