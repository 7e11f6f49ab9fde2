package sys

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountEscapes are the characters that mountinfo writes as octal numbers in paths (fs/proc_namespace.c, mangle).
var mountEscapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#")

// MountPoint is a line of /proc/self/mountinfo, see proc_pid_mountinfo(5).
type MountPoint struct {
	ID, Parent int
	Device     string // "major:minor"
	Root       string // within the filesystem
	Path       string
	Shared     bool // with other mounts, to which it propagates
}

// MountPoints calls f with each mount of the process's namespace, those at one place in the order in which they cover one
// another. A line may have any length: overlays of many layers have long ones, of which a bufio.Scanner takes no more than 64 KiB.
func MountPoints(f func(m MountPoint)) (err error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	r := bufio.NewReaderSize(file, 64<<10)
	for {
		line, err := r.ReadString('\n')
		if m, ok := parseMount(line); ok {
			f(m)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// parseMount reads a line: six fields, then tags such as shared:N up to a single "-".
func parseMount(line string) (m MountPoint, ok bool) {
	head, _, ok := strings.Cut(line, " - ")
	fields := strings.Split(head, " ")
	if !ok || len(fields) < 6 {
		return m, false
	}
	var err1, err2 error
	m.ID, err1 = strconv.Atoi(fields[0])
	m.Parent, err2 = strconv.Atoi(fields[1])
	m.Device, m.Root, m.Path = fields[2], mountEscapes.Replace(fields[3]), mountEscapes.Replace(fields[4])
	for _, tag := range fields[6:] {
		m.Shared = m.Shared || strings.HasPrefix(tag, "shared:")
	}
	return m, err1 == nil && err2 == nil
}

// FindMount returns the mount of an ID; ok is false if the process's namespace has none.
func FindMount(id int) (m MountPoint, ok bool, err error) {
	err = MountPoints(func(p MountPoint) {
		if p.ID == id {
			m, ok = p, true
		}
	})
	return m, ok, err
}

// Binds reports whether the mount shows at its place what the one below has there.
func (m MountPoint) Binds(below MountPoint) bool {
	rel, err := filepath.Rel(below.Path, m.Path)
	return err == nil && m.Device == below.Device && filepath.Join(below.Root, rel) == m.Root
}

// holds reports whether path is dir or beneath it.
func holds(dir, path string) bool {
	rest, ok := strings.CutPrefix(path, strings.TrimSuffix(dir, "/"))
	return ok && (rest == "" || rest[0] == '/')
}

// MountedBelow reports whether something is mounted beneath path, an absolute one without symlinks.
func MountedBelow(path string) (below bool, err error) {
	err = MountPoints(func(m MountPoint) { below = below || holds(path, m.Path) && m.Path != path })
	return below, err
}

// UnmountBelow detaches all that is mounted at path, an absolute one without symlinks, or beneath it, the last first.
func UnmountBelow(path string) error {
	var paths []string
	if err := MountPoints(func(m MountPoint) {
		if holds(path, m.Path) {
			paths = append(paths, m.Path)
		}
	}); err != nil {
		return err
	}
	for i := len(paths) - 1; i >= 0; i-- {
		err := unix.Unmount(paths[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && err != unix.EINVAL && err != unix.ENOENT { // gone with another one
			return &MountError{Call: "umount", Target: paths[i], Err: err}
		}
	}
	return nil
}

// MountID returns the ID of the mount that fd was opened on, as MountPoint has it.
func MountID(fd int) (int, error) {
	data, err := ReadFileAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fdinfo/%d", fd), 4<<10)
	if err != nil {
		return 0, fmt.Errorf("fdinfo: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(id))
		}
	}
	return 0, fmt.Errorf("fdinfo without mnt_id: %w", unix.ENOSYS)
}

// HasMounts reports whether anything is mounted on the mount that fd was opened on, as far as the process's namespace shows.
func HasMounts(fd int) (has bool, err error) {
	id, err := MountID(fd)
	if err != nil {
		return false, err
	}
	err = MountPoints(func(m MountPoint) { has = has || m.Parent == id })
	return has, err
}

// BindSelf mounts the open directory on path, which is its own, and calls attach with the new mount's ID before it is
// there for others to see.
func BindSelf(dirfd int, path string, attach func(id int) error) error {
	fd, err := unix.OpenTree(dirfd, "", cloneFlags|unix.AT_EMPTY_PATH)
	if err != nil {
		return &MountError{Call: "open_tree", Target: path, Err: err}
	}
	defer func() { _ = Close(fd) }()
	id, err := MountID(fd)
	if err != nil {
		return err
	}
	if err := attach(id); err != nil {
		return err
	}
	return MoveMount(fd, path)
}
