//go:build linux

package main

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// initrd writes an initramfs, a cpio archive of the format "newc" (the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst).
type initrd struct {
	file *os.File
	w    *bufio.Writer
	size int64
	ino  int
	made map[string]bool
	err  error
}

func createInitrd(path string) (*initrd, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	return &initrd{file: f, w: bufio.NewWriterSize(f, 1<<20), made: map[string]bool{".": true}}, nil
}

// close ends the archive and returns the first error of all.
func (c *initrd) close() error {
	c.entry("TRAILER!!!", 0, nil)
	return errors.Join(c.err, c.w.Flush(), c.file.Close())
}

func (c *initrd) write(b []byte) {
	n, err := c.w.Write(b)
	c.size += int64(n)
	if c.err == nil {
		c.err = err
	}
}

// pad fills up to a multiple of four bytes.
func (c *initrd) pad() { c.write(make([]byte, (4-c.size%4)%4)) }

func (c *initrd) entry(name string, mode uint32, data []byte) {
	c.ino++
	var b bytes.Buffer
	b.WriteString("070701")
	for _, v := range []uint32{uint32(c.ino), mode, 0, 0, 1, 0, uint32(len(data)), 0, 0, 0, 0, uint32(len(name) + 1), 0} {
		fmt.Fprintf(&b, "%08x", v)
	}
	b.WriteString(name + "\x00")
	c.write(b.Bytes())
	c.pad()
	c.write(data)
	c.pad()
}

// dir makes a directory and its parents.
func (c *initrd) dir(name string) {
	name = strings.TrimPrefix(name, "/")
	if name == "" || c.made[name] {
		return
	}
	c.made[name] = true
	if parent := filepath.Dir(name); parent != "." {
		c.dir(parent)
	}
	c.entry(name, 0o40755, nil)
}

// data makes a file. One that is there already is left alone.
func (c *initrd) data(name string, mode uint32, data []byte) {
	name = strings.TrimPrefix(name, "/")
	if c.made[name] {
		return
	}
	c.dir(filepath.Dir(name))
	c.made[name] = true
	c.entry(name, 0o100000|mode, data)
}

// copy makes a file with the content of one of the host.
func (c *initrd) copy(name, host string) error {
	info, err := os.Stat(host)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(host)
	if err != nil {
		return err
	}
	c.data(name, uint32(info.Mode().Perm()), data)
	return nil
}

// tree copies a directory of the host, symlinks as they are.
func (c *initrd) tree(name, host string) error {
	return filepath.WalkDir(host, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(host, path)
		if err != nil {
			return err
		}
		at := filepath.Join(name, rel)
		switch {
		case d.IsDir():
			c.dir(at)
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			c.dir(filepath.Dir(at))
			c.entry(strings.TrimPrefix(at, "/"), 0o120777, []byte(target))
		case d.Type().IsRegular():
			return c.copy(at, path)
		}
		return nil
	})
}

// program copies a program of the host with the libraries that it is linked to.
func (c *initrd) program(name string) error {
	path, err := exec.LookPath(name)
	if err != nil {
		return err
	}
	if err := c.copy("/usr/bin/"+name, path); err != nil {
		return err
	}
	out, err := exec.Command("ldd", path).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w", path, err)
	}
	for word := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(word, "/") {
			if err := c.copy(word, word); err != nil {
				return err
			}
		}
	}
	return nil
}

// module is a kernel module, uncompressed.
type module struct {
	name string
	data []byte
}

// modules finds the wanted modules below root, each after what it depends on. The
// .modinfo section tells, so no depmod is needed.
func modules(root string, wanted []string) ([]module, error) {
	files := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok && err == nil && d.Type().IsRegular() {
			files[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var order []module
	seen := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		name = strings.ReplaceAll(name, "-", "_")
		if files[name] == "" || seen[name] {
			return nil // built in, or not for this architecture
		}
		seen[name] = true
		m := module{name: name}
		if m.data, err = readModule(files[name]); err != nil {
			return err
		}
		needs, err := dependencies(m.data)
		if err != nil {
			return fmt.Errorf("%s: %w", files[name], err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		order = append(order, m)
		return nil
	}
	for _, name := range wanted {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func readModule(path string) ([]byte, error) {
	if strings.HasSuffix(path, ".xz") {
		return exec.Command("xz", "-dc", path).Output()
	}
	return os.ReadFile(path)
}

// dependencies returns the names that a module's "depends" and "softdep: pre" give.
func dependencies(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(line, "depends="); ok && list != "" {
			names = append(names, strings.Split(list, ",")...)
		}
		if list, ok := strings.CutPrefix(line, "softdep=pre:"); ok {
			names = append(names, strings.Fields(list)...)
		}
	}
	return names, nil
}
