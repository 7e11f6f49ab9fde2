//go:build linux

// Command guestinit is process 1 of a guest: it loads modules, mounts disks, runs the tests
// and powers the guest off. What it has to say goes to the console among their output.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bcc2decd/overlay2/internal/vmtest/spec"
)

const path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guestinit: this is the init of a test guest")
		os.Exit(2)
	}
	if err := run(); err != nil {
		say(spec.LineError+"%v", err)
	}
	say(spec.LineEnd)
	unix.Sync()
	time.Sleep(50 * time.Millisecond) // for the console to drain
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	say(spec.LineError+"power off: %v", err)
}

// say writes one line of its own, whatever the last program left unfinished.
func say(format string, args ...any) { fmt.Printf("\n"+format+"\n", args...) }

func run() error {
	if err := mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	c, err := config()
	if err != nil {
		return err
	}
	if err := os.Setenv("PATH", path); err != nil {
		return err
	}
	if !c.HostFS {
		if err := leaveRootfs(); err != nil {
			return err
		}
	}
	if err := mountBasics(c); err != nil {
		return err
	}
	for _, m := range c.Modules {
		if err := load(m); err != nil {
			return fmt.Errorf("load %s: %w", m, err)
		}
	}
	if c.Policy != "" {
		if err := loadPolicy(c.Policy); err != nil {
			return fmt.Errorf("load the SELinux policy: %w", err)
		}
	}
	for _, d := range c.Disks {
		if err := mount(d.Device, "/mnt/"+d.Name, d.Type, 0, d.Options); err != nil {
			return err
		}
		if err := os.MkdirAll("/mnt/"+d.Name+"/tmp", 0o755); err != nil {
			return err
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	say(spec.LineStart+"%s %d", unix.ByteSliceToString(u.Release[:]), os.Getpagesize())
	for _, r := range c.Runs {
		start := time.Now()
		say(spec.LineRun + r.Name)
		code := execute(c, r)
		say(spec.LineExit+"%s %d %.1f", r.Name, code, time.Since(start).Seconds())
	}
	for _, d := range c.Disks {
		if err := unix.Unmount("/mnt/"+d.Name, 0); err != nil {
			return fmt.Errorf("unmount %s, which the tests should have left: %w", d.Name, err)
		}
	}
	return nil
}

// config reads the file that the kernel's command line names with vmtest=.
func config() (spec.Config, error) {
	var c spec.Config
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return c, err
	}
	for word := range strings.FieldsSeq(string(line)) {
		if name, ok := strings.CutPrefix(word, "vmtest="); ok {
			text, err := os.ReadFile(name)
			if err != nil {
				return c, err
			}
			err = json.Unmarshal(text, &c)
			return c, err
		}
	}
	return c, errors.New("no vmtest= on the kernel's command line")
}

// leaveRootfs makes the root an ordinary mount: the first one of an initramfs can be
// neither unmounted nor pivoted away, which tests of mount namespaces want to do.
func leaveRootfs() error {
	if err := mount("/", "/.root", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	root, err := os.Open("/.root")
	if err != nil {
		return err
	}
	defer root.Close()
	if err := unix.Mount("/.root", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	// No path leads to what was mounted over the root, but its descriptor does. The working directory stays below;
	// execute gives each program its own.
	return unix.Chroot(fmt.Sprintf("/proc/self/fd/%d", root.Fd()))
}

func mountBasics(c spec.Config) error {
	for _, m := range []struct{ what, where, data string }{
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", "mode=0755"},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"tmpfs", "/run", "mode=0755"},
		{"tmpfs", "/mnt", "mode=0755"},
		{"tmpfs", "/tmp", "mode=1777"},
	} {
		// Some kernels have mounted /dev themselves.
		if err := mount(m.what, m.where, m.what, 0, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	if c.HostFS {
		return mount("none", spec.Host, "hostfs", unix.MS_RDONLY, "/")
	}
	return nil
}

func mount(what, where, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(where, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(what, where, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", what, where, err)
	}
	return nil
}

func load(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	// ENODEV: a module for hardware that is not here, such as a checksum instruction.
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// loadPolicy gives SELinux its rules; what runs already, and all that is made from here
// on, gets the label of the policy's initial contexts.
func loadPolicy(name string) error {
	if err := mount("selinuxfs", "/sys/fs/selinux", "selinuxfs", 0, ""); err != nil {
		return err
	}
	policy, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	f, err := os.OpenFile("/sys/fs/selinux/load", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	// In one write, as the kernel wants it.
	_, err = unix.Write(int(f.Fd()), policy)
	return errors.Join(err, f.Close())
}

// execute runs one program and returns its exit code, 128 and the signal if one killed it.
func execute(c spec.Config, r spec.Run) int {
	cmd := exec.Command(r.Argv[0], r.Argv[1:]...)
	cmd.Dir = r.Dir
	cmd.Env = append([]string{"PATH=" + path, "HOME=/tmp"}, c.Env...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(interface {
			Signaled() bool
			Signal() unix.Signal
		}); ok && ws.Signaled() {
			return 128 + int(ws.Signal())
		}
		return exit.ExitCode()
	}
	say("guestinit: %s: %v", r.Name, err)
	return 127
}
