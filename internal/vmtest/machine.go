//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/bcc2decd/overlay2/internal/vmtest/spec"
)

const (
	umlProgram = "linux.uml"
	umlModules = "/usr/lib/uml/modules"
	memory     = "1536M"
	guestCPUs  = 2 // of an emulated guest
)

// qemu returns the name of the emulator for an architecture.
func qemu(arch string) string {
	switch arch {
	case "ppc64le":
		return "qemu-system-ppc64"
	case "arm64":
		return "qemu-system-aarch64"
	}
	return "qemu-system-x86_64"
}

// machine is a guest ready to start: everything below dir is its own.
type machine struct {
	guest     guest
	dir       string // for disks, modules, the initramfs
	repo      string // the module
	cache     string
	guestInit string
	tests     []testBinary
	testArgs  []string
	silence   time.Duration // after which it is taken to hang
	out       io.Writer     // for what is to be seen of it, in whole lines
}

// command makes disks and configuration and returns the process that is the guest.
func (m *machine) command() (*exec.Cmd, error) {
	images, disks, err := m.makeDisks()
	if err != nil {
		return nil, err
	}
	c := spec.Config{HostFS: m.guest.uml, Disks: disks, Env: m.env()}
	if m.guest.uml {
		return m.uml(c, images)
	}
	return m.qemu(c, images)
}

// env is the environment of the tests.
func (m *machine) env() []string {
	env := []string{"OVERLAY2_TEST_REQUIRE=" + m.guest.require, "TMPDIR=/mnt/" + m.guest.disks[0] + "/tmp"}
	if m.guest.testFS != "" {
		env = append(env, "OVERLAY2_TEST_FS="+m.guest.testFS)
		if !strings.Contains(m.guest.testFS, "tmpfs") {
			env = append(env, "OVERLAY2_TEST_DIR_TMPFS=/mnt/"+m.guest.disks[0])
		}
	}
	for _, name := range m.guest.disks {
		env = append(env, "OVERLAY2_TEST_DIR_"+strings.ToUpper(name)+"=/mnt/"+name)
	}
	return env
}

func (m *machine) makeDisks() (images []string, disks []spec.Disk, err error) {
	for i, name := range m.guest.disks {
		kind := diskKinds()[name]
		image := filepath.Join(m.dir, name+".img")
		f, err := os.Create(image)
		if err != nil {
			return nil, nil, err
		}
		if err := f.Truncate(diskSize); err != nil {
			return nil, nil, err
		}
		if err := f.Close(); err != nil {
			return nil, nil, err
		}
		args := append(append([]string{}, kind.mkfs...), image)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return nil, nil, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
		device := fmt.Sprintf("/dev/vd%c", 'a'+i)
		if m.guest.uml {
			device = fmt.Sprintf("/dev/ubd%c", 'a'+i)
		}
		images = append(images, image)
		disks = append(disks, spec.Disk{Name: name, Device: device, Type: kind.fsType, Options: kind.options})
	}
	return images, disks, nil
}

// uml is user-mode Linux: a process whose root is the host's, read-only. It says
// nothing of a crash but what is on its console.
func (m *machine) uml(c spec.Config, images []string) (*exec.Cmd, error) {
	mods, err := modules(umlModules, moduleNames())
	if err != nil {
		return nil, err
	}
	for _, mod := range mods {
		path := filepath.Join(m.dir, mod.name+".ko")
		if err := os.WriteFile(path, mod.data, 0o644); err != nil {
			return nil, err
		}
		c.Modules = append(c.Modules, filepath.Join(spec.Host, path))
	}
	for _, t := range m.tests {
		c.Runs = append(c.Runs, spec.Run{Name: t.name, Dir: filepath.Join(spec.Host, t.dir), Argv: append([]string{filepath.Join(spec.Host, t.file)}, m.testArgs...)})
	}
	text, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	config := filepath.Join(m.dir, "config.json")
	if err := os.WriteFile(config, text, 0o644); err != nil {
		return nil, err
	}
	args := []string{
		"mem=" + memory, "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "init=" + m.guestInit,
		"vmtest=" + config, "con=null", "con0=fd:0,fd:1", "loglevel=4", "panic=-1", m.guest.append,
	}
	for i, image := range images {
		args = append(args, fmt.Sprintf("ubd%d=%s", i, image))
	}
	cmd := exec.Command(umlProgram, args...)
	cmd.Env = os.Environ()
	if _, err := os.Stat("/dev/shm"); err == nil {
		cmd.Env = append(cmd.Env, "TMPDIR=/dev/shm") // the guest's memory is a file there
	}
	return cmd, nil
}

// qemu emulates a machine with everything in an initramfs.
func (m *machine) qemu(c spec.Config, images []string) (*exec.Cmd, error) {
	kernel, err := kernelOf(m.guest, m.cache)
	if err != nil {
		return nil, err
	}
	image, err := kernelImage(kernel)
	if err != nil {
		return nil, err
	}
	rd := filepath.Join(m.dir, "initrd")
	if err := m.makeInitrd(rd, kernel, c); err != nil {
		return nil, err
	}
	console, model := "ttyS0", []string{"-cpu", "max"}
	switch m.guest.arch {
	case "ppc64le":
		console = "hvc0"
		model = []string{"-M", "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off", "-cpu", "power9"}
	case "arm64":
		console = "ttyAMA0"
		// Signed pointers as the real algorithm makes them cost half of the emulation's time.
		model = []string{"-M", "virt", "-cpu", "max,pauth-impdef=on"}
	}
	args := model
	args = append(args,
		"-accel", "tcg,thread=multi,tb-size=256", "-m", memory, "-smp", strconv.Itoa(guestCPUs), "-kernel", image, "-initrd", rd,
		"-append", "console="+console+" panic=-1 loglevel=4 random.trust_cpu=1 mitigations=off vmtest=/config.json "+m.guest.append,
		"-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console", "-device", "virtio-rng-pci",
	)
	for i, image := range images {
		args = append(args, "-drive", fmt.Sprintf("file=%s,if=none,id=d%d,format=raw,cache=unsafe,discard=unmap", image, i),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i))
	}
	return exec.Command(qemu(m.guest.arch), args...), nil
}

// makeInitrd writes the initramfs: init, configuration, modules, tests with their
// testdata in the same places relative to each other as in the repository, and tools.
func (m *machine) makeInitrd(path, kernel string, c spec.Config) error {
	rd, err := createInitrd(path)
	if err != nil {
		return err
	}
	err = m.fillInitrd(rd, kernel, c)
	if e := rd.close(); err == nil {
		err = e
	}
	return err
}

func (m *machine) fillInitrd(rd *initrd, kernel string, c spec.Config) error {
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "mnt", "etc", "root"} {
		rd.dir(d)
	}
	mods, err := modules(filepath.Join(kernel, "lib/modules"), moduleNames())
	if err != nil {
		return err
	}
	for _, mod := range mods {
		name := "/lib/modules/" + mod.name + ".ko"
		rd.data(name, 0o644, mod.data)
		c.Modules = append(c.Modules, name)
	}
	for _, t := range m.tests {
		dir := filepath.Join("/src", t.name)
		program := filepath.Join(dir, filepath.Base(t.file))
		if err := rd.copy(program, t.file); err != nil {
			return err
		}
		if err := addTestdata(rd, dir, t.dir); err != nil {
			return err
		}
		c.Runs = append(c.Runs, spec.Run{Name: t.name, Dir: dir, Argv: append([]string{program}, m.testArgs...)})
	}
	if err := addTestdata(rd, "/src", m.repo); err != nil {
		return err
	}
	if m.guest.arch == "amd64" {
		for _, name := range guestTools() {
			if err := rd.program(name); err != nil {
				return err
			}
		}
	}
	if m.guest.selinux {
		if c.Policy, err = m.addPolicy(rd); err != nil {
			return err
		}
	}
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	rd.data("/config.json", 0o644, text)
	return rd.copy("/init", m.guestInit)
}

// addTestdata copies the directory testdata of a package, if it has one.
func addTestdata(rd *initrd, to, from string) error {
	host := filepath.Join(from, "testdata")
	if _, err := os.Stat(host); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return rd.tree(filepath.Join(to, "testdata"), host)
}
