package overlaytest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// dockerClient is that of the distribution: an older one may come before it in PATH.
const dockerClient = "/usr/bin/docker"

// Dockerd is a Docker daemon of a test: with its own directories and socket, no network, and nothing in
// common with a daemon of the machine.
type Dockerd struct {
	t testing.TB
	// Data is the daemon's data root; its layers lie in overlay2 there.
	Data string
	run  string // sockets, pid files, log
	cmd  *exec.Cmd
	done chan error
}

// NewDockerd returns a daemon, not started yet, that keeps its data below dir. It needs "dockerd". It is stopped,
// and what it left mounted is unmounted, at the test's end.
func NewDockerd(t testing.TB, dir string) *Dockerd {
	t.Helper()
	Require(t, "root", "dockerd")
	run, err := os.MkdirTemp("", "otdocker-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	d := &Dockerd{t: t, Data: filepath.Join(dir, "docker"), run: run}
	t.Cleanup(func() {
		d.Stop()
		err := errors.Join(umountBelow(dir), umountBelow(run))
		if t.Failed() {
			if log, err := os.ReadFile(filepath.Join(run, "log")); err == nil {
				t.Logf("dockerd: %s", log[max(0, len(log)-5000):])
			}
		}
		if err := errors.Join(err, os.RemoveAll(run)); err != nil {
			t.Error(err)
		}
	})
	return d
}

// Start starts the daemon with more arguments and returns when it answers.
func (d *Dockerd) Start(args ...string) {
	d.t.Helper()
	log, err := os.OpenFile(filepath.Join(d.run, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer log.Close()
	d.cmd = exec.Command("dockerd", append([]string{
		"--data-root", d.Data, "--exec-root", filepath.Join(d.run, "exec"), "-H", d.host(), "-p", filepath.Join(d.run, "pid"),
		"--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none",
	}, args...)...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	// Interrupting the test must not end the daemon before it is stopped in order.
	d.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.done = make(chan error, 1)
	cmd, done := d.cmd, d.done
	go func() { done <- cmd.Wait() }()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if exec.Command(dockerClient, "-H", d.host(), "version").Run() == nil {
			return
		}
		select {
		case err := <-d.done:
			d.cmd = nil
			d.t.Fatalf("dockerd ended: %v", err)
		default:
		}
		if time.Now().After(end) {
			d.t.Fatal("dockerd does not answer")
		}
	}
}

func (d *Dockerd) host() string { return "unix://" + filepath.Join(d.run, "sock") }

// Stop ends the daemon in order. One that does not run is no error.
func (d *Dockerd) Stop() {
	d.t.Helper()
	d.end(unix.SIGTERM)
}

// Kill ends the daemon and its containerd by SIGKILL, as a crash would, and unmounts nothing.
func (d *Dockerd) Kill() {
	d.t.Helper()
	d.end(unix.SIGKILL)
	d.killContainerd()
	if err := os.Remove(filepath.Join(d.run, "pid")); err != nil && !errors.Is(err, os.ErrNotExist) {
		d.t.Error(err)
	}
}

// killContainerd ends the containerd that a killed daemon has left.
func (d *Dockerd) killContainerd() {
	d.t.Helper()
	pidFile := filepath.Join(d.run, "exec/containerd/containerd.pid")
	data, err := os.ReadFile(pidFile)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	pid := 0
	if err == nil {
		_, err = fmt.Sscan(string(data), &pid)
	}
	if err != nil {
		d.t.Error(err)
		return
	}
	// It names the directory of this very daemon, or the number is another process's by now.
	running := func() bool {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err == nil && bytes.Contains(line, []byte(d.run))
	}
	if running() {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
			d.t.Error(err)
		}
	}
	for range 100 {
		if !running() {
			// Where nobody reaps orphans the next daemon would take the dead one for alive.
			if err := os.Remove(pidFile); err != nil {
				d.t.Error(err)
			}
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	d.t.Errorf("containerd %d does not end", pid)
}

func (d *Dockerd) end(sig unix.Signal) {
	d.t.Helper()
	if d.cmd == nil {
		return
	}
	if err := d.cmd.Process.Signal(sig); err != nil {
		d.t.Error(err)
	}
	select {
	case <-d.done:
	case <-time.After(time.Minute):
		d.t.Error("dockerd does not end; killed")
		_ = d.cmd.Process.Kill()
		<-d.done
	}
	d.cmd = nil
}

// Docker runs the client and returns what it printed, without the last newline.
func (d *Dockerd) Docker(args ...string) string {
	d.t.Helper()
	out, err := d.Try(nil, args...)
	if err != nil {
		d.t.Fatalf("docker %s: %v", strings.Join(args, " "), err)
	}
	return strings.TrimSuffix(string(out), "\n")
}

// Try runs the client with the given input and returns what it printed.
func (d *Dockerd) Try(in []byte, args ...string) ([]byte, error) {
	cmd := exec.Command(dockerClient, append([]string{"-H", d.host()}, args...)...)
	cmd.Env = append(os.Environ(), "DOCKER_BUILDKIT=0", "HOME="+d.run)
	cmd.Stdin = bytes.NewReader(in)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, said.Bytes())
	}
	return out, err
}

// probeDockerd tells whether there is a daemon, its client, what runs containers, and the control groups that they need.
func probeDockerd() error {
	if _, err := os.Stat(dockerClient); err != nil {
		return err
	}
	for _, name := range []string{"dockerd", "containerd", "runc"} {
		if _, err := exec.LookPath(name); err != nil {
			return err
		}
	}
	for _, name := range []string{"cgroup.controllers", "devices"} { // of version 2 and 1
		if _, err := os.Stat("/sys/fs/cgroup/" + name); err == nil {
			return nil
		}
	}
	return errors.New("no control groups are mounted at /sys/fs/cgroup")
}
