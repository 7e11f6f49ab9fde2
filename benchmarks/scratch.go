//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// scratch makes filesystems, one for each run: a filesystem that has lived slows down,
// ext4 above all, which leaves an inode alone for minutes after it was freed.
type scratch struct {
	dir    string // for mount points; its path is short, as mount data is
	images string // for the images of ext4 and xfs
}

// imageSize is the apparent size of an image; only what is written takes memory.
const imageSize = 16 << 30

// available returns why a filesystem cannot be had, "" if it can.
func (s *scratch) available(kind string) string {
	if kind == "tmpfs" {
		return ""
	}
	if _, err := exec.LookPath("mkfs." + kind); err != nil {
		return "mkfs." + kind + " is not installed"
	}
	return ""
}

// fresh mounts a new filesystem and returns where, and what unmounts it.
func (s *scratch) fresh(kind string) (dir string, free func() error, err error) {
	dir, err = os.MkdirTemp(s.dir, "")
	if err != nil {
		return "", nil, err
	}
	if kind == "tmpfs" {
		err = unix.Mount("tmpfs", dir, "tmpfs", 0, "size=90%,nr_inodes=0")
	} else {
		err = s.image(kind, dir)
	}
	if err != nil {
		return "", nil, errors.Join(err, os.Remove(dir))
	}
	return dir, func() error { return unmount(dir) }, nil
}

func (s *scratch) image(kind, dir string) (err error) {
	f, err := os.CreateTemp(s.images, "o2bench-*.img")
	if err != nil {
		return err
	}
	// The mount keeps the image; its name is needed no longer.
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if err := f.Truncate(imageSize); err != nil {
		return err
	}
	force := "-F"
	if kind == "xfs" {
		force = "-f"
	}
	if err := run("mkfs."+kind, "-q", force, f.Name()); err != nil {
		return err
	}
	return run("mount", "-t", kind, "-o", "loop", f.Name(), dir)
}

func run(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

// unmount takes down a filesystem with all that a worker left mounted in it.
func unmount(dir string) error {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			points = append(points, f[4])
		}
	}
	for _, p := range slices.Backward(points) {
		flags := 0
		if p != dir {
			flags = unix.MNT_DETACH
		}
		err := unix.Unmount(p, flags)
		for try := 0; err == unix.EBUSY && try < 50; try++ {
			time.Sleep(20 * time.Millisecond)
			err = unix.Unmount(p, flags)
		}
		if err != nil {
			return &os.PathError{Op: "unmount", Path: p, Err: err}
		}
	}
	return os.Remove(dir)
}

// cleanUp unmounts whatever an interrupted run left.
func (s *scratch) cleanUp() error {
	entries, err := os.ReadDir(s.dir)
	for _, e := range entries {
		err = errors.Join(err, unmount(filepath.Join(s.dir, e.Name())))
	}
	return errors.Join(err, os.Remove(s.dir))
}
