//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/bcc2decd/overlay2/internal/linkid"
	"github.com/bcc2decd/overlay2/internal/sys"
)

const (
	// linkRoom is what a layer takes of the page of mount(2): "l/", its link, a colon. Left for
	// everything else are pageRoom bytes, so that a page of 4 KiB holds as many layers as Docker allows.
	linkRoom = len(linkPrefix) + linkid.Length + 1
	pageRoom = 4096 - 128*linkRoom
	// threadLowers is the number of layers from which a thread of its own that stands in the home
	// costs less than the kernel's walk to the home for each name (measured; they meet at about 80).
	threadLowers = 80
)

// legacyLowers is how many lower layers surely fit into a page as relative links; 128 with
// pages of 4 KiB.
func legacyLowers(pageSize int) int { return min((pageSize-pageRoom)/linkRoom, maxLowers) }

// maxDepth returns how many layers a layer can have below it with a way of mounting. It is
// what Docker can mount, too, only with MountLegacy.
func (f facts) maxDepth(method MountMethod) int {
	if method == MountLegacy || method == MountAuto && f.newAPI != yes && f.descriptors != yes {
		return legacyLowers(os.Getpagesize())
	}
	return maxLowers
}

// checkMethod returns ErrNotSupported if the kernel lacks the way that was asked for.
func (f facts) checkMethod(method MountMethod) error {
	switch {
	case method == MountNewAPI && f.newAPI != yes:
		return unsupported("the kernel does not mount an overlay layer by layer: %w", f.newAPIErr)
	case method == MountDescriptors && f.descriptors != yes:
		return unsupported("the kernel does not mount an overlay of open directories: %w", f.descriptorsErr)
	case method == MountFiles && f.files != yes:
		return unsupported("the kernel takes no open directories for layers: %w", f.filesErr)
	}
	return nil
}

// mount mounts the overlay at target, a name relative to home.
func (s mountSpec) mount(target string, method MountMethod, f facts) error {
	if s.ready != nil {
		return s.mountReady(target)
	}
	if len(s.lowers) > maxLowers {
		return fmt.Errorf("%w: a mount of %d layers, at most %d", ErrTooDeep, len(s.lowers), maxLowers)
	}
	switch method {
	case MountNewAPI:
		return s.mountNew(target)
	case MountDescriptors:
		return s.mountDescriptors(target)
	case MountFiles:
		return s.attach(target, s.detachedFiles)
	}
	if data, ok := s.fitting(s.home+"/", sys.MaxMountData()); ok {
		if err := s.checkAll(); err != nil {
			return err
		}
		err := sys.MountOverlay(s.home+"/"+target, data, 0)
		if err == nil {
			s.remember(s.home+"/", "")
		}
		return err
	}
	// A kernel too old for both other ways was not asked whether it takes such names.
	if method == MountAuto && (f.newAPI == yes || f.descriptors == yes) {
		if mounted, err := s.mountHeld(target); mounted || err != nil {
			return err
		}
	}
	newAPI := method == MountAuto && f.newAPI == yes
	if newAPI && len(s.lowers) < threadLowers {
		return s.mountNew(target)
	}
	data := s.data("")
	switch {
	case len(data) <= sys.MaxMountData():
		if err := s.checkAll(); err != nil {
			return err
		}
		return sys.MountOverlayFrom(s.home, target, data, 0)
	case newAPI:
		return s.mountNew(target)
	case method == MountAuto && f.descriptors == yes:
		return s.mountDescriptors(target)
	}
	return s.tooLong(len(data))
}

// mountHeld mounts the overlay at target by mount(2), with layers named by directories that are open, to which the
// kernel need not walk: by host paths, of which about 200 fit into a page, or by their mere numbers, on a thread that stands
// where these are names. It returns false if these are not open, do not fit, or if there is no /proc.
func (s mountSpec) mountHeld(target string) (mounted bool, err error) {
	if err := s.checkAll(); err != nil {
		return false, err
	}
	if !s.hold(sys.ProcFDs) {
		return false, nil
	}
	dir := ""
	if data, ok := s.fitting(s.home+"/", sys.MaxMountData()); ok {
		err = sys.MountOverlay(s.home+"/"+target, data, 0)
	} else {
		dir = sys.ProcFDs
		s.hold("")
		if data, ok = s.fitting(s.home+"/", sys.MaxMountData()); !ok {
			return false, nil
		}
		err = sys.MountOverlayFrom(dir, s.home+"/"+target, data, 0)
	}
	if err == nil {
		s.remember("", dir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // whatever is missing, another way will say it by its name
	}
	return err == nil, err
}

// mountNew mounts the overlay at target by the new mount API.
func (s mountSpec) mountNew(target string) error { return s.attach(target, s.detached) }

// attach makes a mount and puts it at target.
func (s mountSpec) attach(target string, detached func(attrs int) (int, error)) error {
	fd, err := detached(0)
	if err != nil {
		return err
	}
	err = sys.MoveMount(fd, s.home+"/"+target)
	return errors.Join(err, sys.Close(fd))
}

// detached returns a descriptor of the overlay's mount, which is in no mount table. attrs
// are MOUNT_ATTR_*.
func (s mountSpec) detached(attrs int) (fd int, err error) {
	prefix := s.home + "/"
	deep := len(s.lowers) >= threadLowers
	if deep {
		if err := s.checkAll(); err != nil {
			return -1, err
		}
		deep = !s.hold(sys.ProcFDs)
	}
	switch {
	case deep:
		err = sys.OnOwnThreadIn(s.home, func() error {
			fd, err = s.detachedFrom("", attrs)
			return err
		})
		return fd, err
	case strings.Contains(prefix, `\`) || len(prefix)+s.longestName() > sys.MaxFsconfigString:
		// lowerdir+ takes a name as it is, but upperdir wants backslashes doubled; and no name
		// may be longer than a string of fsconfig(2). An open home has a name that is short and plain.
		homefd, err := sys.OpenRoot(s.home)
		if err != nil {
			return -1, err
		}
		defer func() { err = errors.Join(err, sys.Close(homefd)) }()
		prefix = sys.ProcPath(homefd) + "/"
	}
	return s.detachedFrom(prefix, attrs)
}

// detachedFrom is detached with a prefix for names, empty where the thread stands in home.
func (s mountSpec) detachedFrom(prefix string, attrs int) (fd int, err error) {
	c, err := sys.OpenFS("overlay")
	if err != nil {
		return -1, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	c.Set("source", "overlay")
	for i, lower := range s.lowers {
		if s.held != nil {
			c.Set("lowerdir+", s.held[i])
			continue
		}
		if err := s.check(i); err != nil {
			return -1, err
		}
		c.Set("lowerdir+", prefix+s.dir+lower)
	}
	if s.upper != "" {
		c.Set("upperdir", prefix+s.upper)
		c.Set("workdir", prefix+s.work)
	}
	s.setOptions(c)
	return c.Mount(attrs)
}

// setOptions sets what is not a layer.
func (s mountSpec) setOptions(c *sys.FSContext) {
	for _, o := range s.options {
		if key, value, ok := strings.Cut(o, "="); ok {
			c.Set(key, value)
		} else {
			c.Flag(key)
		}
	}
	if s.label != "" {
		c.Set("context", s.label)
	}
}

// longestName returns the length of the longest of the overlay's names.
func (s mountSpec) longestName() int {
	n := max(len(s.upper), len(s.work))
	for _, lower := range s.lowers {
		n = max(n, len(lower))
	}
	return n + len(s.dir)
}

// mountDescriptors mounts the overlay at target by mount(2), with the numbers of open
// directories as names.
func (s mountSpec) mountDescriptors(target string) error {
	if err := s.checkAll(); err != nil {
		return err
	}
	return s.mountNumbers(s.home+"/"+target, sys.MountOverlayFrom)
}

// mountHere mounts the overlay, whose layers are checked, at target, an absolute path, on a
// thread that is the caller's own and whose working directory it may change.
func (s mountSpec) mountHere(target string, method MountMethod) error {
	data, ok := s.fitting("", sys.MaxMountData())
	switch {
	case ok && method != MountDescriptors:
		return sys.MountOverlayHere(s.home, target, data, 0)
	case method == MountLegacy:
		return s.tooLong(len(s.data("")))
	}
	return s.mountNumbers(target, sys.MountOverlayHere)
}

// tooLong returns the error in place of data that the kernel would cut silently, to mount
// some of the layers.
func (s mountSpec) tooLong(n int) error {
	return fmt.Errorf("%w: %d layers take %d bytes, mount(2) takes %d", ErrMountTooLong, len(s.lowers), n, sys.MaxMountData())
}

// mountNumbers opens the directories, strictly, so that what the links led to is what is
// mounted, and calls mount with data in which their numbers stand for them, relative to dir.
func (s mountSpec) mountNumbers(target string, mount func(dir, target, data string, flags uintptr) error) (err error) {
	homefd, err := sys.OpenRoot(s.home)
	if err != nil {
		return err
	}
	fds := []int{homefd}
	defer func() {
		for _, fd := range fds {
			err = errors.Join(err, sys.Close(fd))
		}
	}()
	s.dirs()
	names := make([]*string, 0, len(s.lowers)+2)
	for i := range s.lowers {
		names = append(names, &s.lowers[i])
	}
	if s.upper != "" {
		names = append(names, &s.upper, &s.work)
	}
	for _, name := range names {
		fd, err := sys.OpenBeneath(homefd, *name)
		if err != nil {
			return fmt.Errorf("open %s: %w", *name, err)
		}
		fds = append(fds, fd)
		*name = strconv.Itoa(fd)
	}
	data := s.data("")
	if len(data) > sys.MaxMountData() {
		return s.tooLong(len(data))
	}
	return mount(sys.ProcFDs, target, data, 0)
}
