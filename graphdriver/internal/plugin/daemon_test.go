//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

const (
	dockerd = "/usr/sbin/dockerd"
	docker  = "/usr/bin/docker" // an older one may come first in PATH
)

// machine is a dockerd of its own with its plugin: no directory, socket or process is shared with another.
type machine struct {
	t      *testing.T
	dir    string
	name   string // the driver's, by which dockerd finds the plugin's socket
	plugin *exec.Cmd
	daemon *exec.Cmd
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	overlaytest.Require(t, "root", "cmd:"+dockerd, "cmd:"+docker)
	dir, err := os.MkdirTemp("", "dockerd-") // t.TempDir's names are too long for sockets
	must(t, err)
	m := &machine{t: t, dir: dir, name: fmt.Sprintf("overlay2test%d", os.Getpid())}
	t.Cleanup(m.clean)
	must(t, os.MkdirAll(m.path("ctx"), 0o755))
	build := exec.Command("go", "build", "-o", m.path("plugin"), ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

// in returns m for a part of the test.
func (m *machine) in(t *testing.T) *machine {
	part := *m
	part.t = t
	return &part
}

func (m *machine) socket() string { return "/run/docker/plugins/" + m.name + ".sock" }

// begin starts a program that goes on until it is stopped.
func (m *machine) begin(log, program string, args ...string) *exec.Cmd {
	m.t.Helper()
	f, err := os.OpenFile(m.path(log), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(m.t, err)
	defer f.Close()
	c := exec.Command(program, args...)
	c.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR=" + m.dir}
	c.Stdout, c.Stderr = f, f
	must(m.t, c.Start())
	return c
}

// wait waits until f is content.
func (m *machine) wait(what string, f func() bool) {
	m.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			m.t.Fatalf("%s: waited in vain", what)
		}
	}
}

func (m *machine) startPlugin() {
	m.t.Helper()
	m.plugin = m.begin("plugin.log", m.path("plugin"), "-socket", m.socket(), "-state", m.path("state"))
	m.wait("plugin", func() bool {
		_, err := os.Stat(m.socket())
		return err == nil && listening(m.socket())
	})
}

func listening(socket string) bool {
	l, err := listen(socket)
	if err == nil { // a dead one's socket was taken over: give it back
		return errors.Is(l.Close(), unix.EADDRINUSE)
	}
	return strings.Contains(err.Error(), "another server")
}

func (m *machine) startDaemon(driver string) {
	m.t.Helper()
	m.daemon = m.begin("dockerd.log", dockerd, "--experimental", "--storage-driver", driver, "--data-root", m.path("data"), "--exec-root", m.path("exec"),
		"-H", "unix://"+m.path("docker.sock"), "-p", m.path("docker.pid"), "--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false")
	m.wait("dockerd", func() bool { return m.command("version").Run() == nil })
	if got := strings.TrimSpace(m.docker("info", "-f", "{{.Driver}}")); got != driver {
		m.t.Fatalf("dockerd uses the driver %s", got)
	}
}

func (m *machine) start() {
	m.t.Helper()
	m.startPlugin()
	m.startDaemon(m.name)
}

// end ends a program by a signal and waits for it.
func (m *machine) end(c *exec.Cmd, signal unix.Signal) {
	m.t.Helper()
	must(m.t, c.Process.Signal(signal))
	err := c.Wait()
	if signal == unix.SIGTERM {
		must(m.t, err)
	}
}

// killDaemon kills dockerd and so its containerd, which asked for that. It is the zombie of whoever takes orphans then:
// a new dockerd would believe that it lives.
func (m *machine) killDaemon() {
	m.t.Helper()
	file := m.path("exec/containerd/containerd.pid")
	pid, err := os.ReadFile(file)
	must(m.t, err)
	m.end(m.daemon, unix.SIGKILL)
	m.wait("end of containerd", func() bool {
		b, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/cmdline")
		return err != nil || len(b) == 0
	})
	for _, file := range []string{file, m.path("docker.pid")} {
		must(m.t, os.Remove(file))
	}
}

func (m *machine) stop() {
	m.t.Helper()
	m.end(m.daemon, unix.SIGTERM)
	m.end(m.plugin, unix.SIGTERM)
}

func (m *machine) command(args ...string) *exec.Cmd {
	c := exec.Command(docker, args...)
	c.Env = append(os.Environ(), "DOCKER_HOST=unix://"+m.path("docker.sock"), "DOCKER_CONFIG="+m.path("config"))
	return c
}

// docker runs the client and returns what it prints.
func (m *machine) docker(args ...string) string {
	m.t.Helper()
	return m.run(m.command(args...))
}

func (m *machine) run(c *exec.Cmd) string {
	m.t.Helper()
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	start := time.Now()
	err := c.Run()
	m.t.Logf("%.1fs: docker %s", time.Since(start).Seconds(), strings.Join(c.Args[1:], " "))
	if err != nil {
		m.t.Fatalf("%s: %v\n%s%s", strings.Join(c.Args, " "), err, out.String(), errs.String())
	}
	return out.String()
}

// box runs a shell script in a new container, with flags of docker run before the image.
func (m *machine) box(image, script string, flags ...string) string {
	m.t.Helper()
	return m.docker(slices.Concat([]string{"run", "--pull", "never", "--network", "none"}, flags, []string{image, "/bin/sh", "-ec", script})...)
}

// equal checks what a command printed.
func (m *machine) equal(what, got, want string) {
	m.t.Helper()
	if got != want {
		m.t.Errorf("%s:\n%s\nwant:\n%s", what, got, want)
	}
}

// mounts returns the mount points below a directory.
func mounts(t *testing.T, dir string) (points []string) {
	t.Helper()
	f, err := os.Open("/proc/self/mountinfo")
	must(t, err)
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if point := strings.Fields(s.Text())[4]; strings.HasPrefix(point, dir+"/") {
			points = append(points, point)
		}
	}
	return points
}

// clean ends what is left, also of a test that failed, and shows the logs then.
func (m *machine) clean() {
	if m.t.Failed() {
		for _, log := range []string{"plugin.log", "dockerd.log"} {
			b, _ := os.ReadFile(m.path(log)) // or there is none
			m.t.Logf("%s:\n%s", log, b[max(0, len(b)-2000):])
		}
	}
	// The daemon's children have its directory in their arguments, and containers are below them.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for pids := m.processes(); len(pids) > 0 && ctx.Err() == nil; pids = m.processes() {
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL) // it may be gone
		}
		time.Sleep(100 * time.Millisecond)
		for _, c := range []*exec.Cmd{m.daemon, m.plugin} {
			if c != nil && c.ProcessState == nil {
				_ = c.Wait() // killed
			}
		}
	}
	points := mounts(m.t, m.dir)
	slices.Reverse(points)
	for _, point := range points {
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL {
			m.t.Errorf("unmount %s: %v", point, err)
		}
	}
	if err := os.Remove(m.socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		m.t.Error(err)
	}
	if err := os.RemoveAll(m.dir); err != nil {
		m.t.Error(err)
	}
}

// processes returns those that have the machine's directory in their arguments, and theirs.
func (m *machine) processes() (pids []int) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	must(m.t, err)
	parents := make(map[int]int)
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		b, err := os.ReadFile(dir + "/cmdline")
		if err != nil || len(b) == 0 {
			continue // ended
		}
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		parents[pid], _ = strconv.Atoi(fields[1])
		if bytes.Contains(b, []byte(m.dir+"/")) {
			pids = append(pids, pid)
		}
	}
	for i := 0; i < len(pids); i++ {
		for pid, parent := range parents {
			if parent == pids[i] && !slices.Contains(pids, pid) {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}
