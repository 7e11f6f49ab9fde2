package archive

import (
	"errors"
	"fmt"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// errSkipped says that the target is a device that was not made.
var errSkipped = errors.New("skipped")

// hardLink makes another name, base in dir, of what the entry links to.
func (b *builder) hardLink(e *tarEntry, dir, base string) error {
	if base == "" {
		return fmt.Errorf("%w: only a directory has this name", ErrBreakout)
	}
	return b.linkTo(e, func() (*dirNode, string, error) {
		err := b.walk(dir, walkMake)
		return b.top(), base, err
	})
}

// linkTo makes a hard link to the entry's target; into says where, after the target was found.
func (b *builder) linkTo(e *tarEntry, into func() (*dirNode, string, error)) (err error) {
	src, name, err := b.linkTarget(e.link)
	if err == errSkipped {
		b.skippedDevices.Add(1)
		return nil
	}
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", e.link, err)
	}
	defer func() { err = errors.Join(err, sys.Close(src)) }()
	var st unix.Stat_t
	if err := sys.Fstatat(src, name, &st); err != nil {
		return fmt.Errorf("hard link to %q: %w", e.link, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return fmt.Errorf("hard link to %q, a directory: %w", e.link, unix.EPERM)
	}
	dir, base, err := into()
	if err != nil {
		return err
	}
	var there unix.Stat_t
	if err := sys.Fstatat(dir.fd, base, &there); err == nil && there.Dev == st.Dev && there.Ino == st.Ino {
		return nil // to itself, or a second time
	}
	return b.replace(dir, base, func() error { return sys.Linkat(src, name, dir.fd, base) })
}

// linkTarget finds the target of a hard link: a handle of its directory, which is the
// caller's, and its name there. A file that only a lower layer has is copied up, as
// overlayfs would.
func (b *builder) linkTarget(link string) (dirfd int, name string, err error) {
	if first, rest := nextComponent(link); first == plnkDir && b.plnk != nil {
		name, more := nextComponent(rest)
		if name == "" || more != "" {
			return -1, "", unix.ENOENT
		}
		fd, err := sys.Dup(b.plnk.fd)
		return fd, name, err
	}
	dir, name := splitPath(link)
	if strings.HasPrefix(name, whiteoutPrefix) {
		return -1, "", ErrInvalidWhiteout
	}
	err = b.walk(dir, walkCopyUp)
	if b.clamped {
		return -1, "", ErrBreakout
	}
	if err != nil {
		return -1, "", err
	}
	top := b.top()
	if name == "" {
		return -1, "", fmt.Errorf("a directory: %w", unix.EPERM)
	}
	var st unix.Stat_t
	err = sys.Fstatat(top.fd, name, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		if err := b.copyUp(top, name); err != nil {
			return -1, "", err
		}
	case err != nil:
		return -1, "", err
	case isWhiteoutStat(&st):
		return -1, "", unix.ENOENT
	}
	fd, err := sys.Dup(top.fd)
	return fd, name, err
}
