//go:build linux

package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/bcc2decd/overlay2/benchmarks/wire"
)

// role says what a system is compared as.
type role int

const (
	ours role = iota
	peer
	limits
	tool
)

// system is a worker program and how to start it.
type system struct {
	name string // in results
	role role
	dir  string // below the benchmarks module
	arg  string

	program string
	broken  string // why it cannot run
	size    int64  // of the stripped program
	modules int    // linked into it, without those of this repository
}

func allSystems() []*system {
	return []*system{
		{name: "overlay2", role: ours, dir: "workers/ours"},
		{name: "moby", role: peer, dir: "peers/moby"},
		{name: "c/storage", role: peer, dir: "peers/cstorage"},
		{name: "containerd", role: peer, dir: "peers/containerd"},
		{name: "limit1", role: limits, dir: "workers/limit", arg: "limit1"},
		{name: "limitN", role: limits, dir: "workers/limit", arg: "limitN"},
		{name: "tar", role: tool, dir: "workers/limit", arg: "tar"},
		{name: "cp -a", role: tool, dir: "workers/limit", arg: "cp"},
	}
}

// build compiles the worker. A system that does not build is broken, and no more.
func (s *system) build(ctx context.Context, root, bin string) {
	s.program = filepath.Join(bin, filepath.Base(s.dir))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w",
		"-tags=exclude_graphdriver_btrfs", "-o", s.program, ".")
	cmd.Dir = filepath.Join(root, s.dir)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.broken = fmt.Sprintf("does not build: %v: %s", err, firstLines(out, 3))
		return
	}
	info, err := os.Stat(s.program)
	if err != nil {
		s.broken = err.Error()
		return
	}
	s.size = info.Size()
	if bi, err := buildinfo.ReadFile(s.program); err == nil {
		for _, m := range bi.Deps {
			if !strings.HasPrefix(m.Path, "github.com/bcc2decd/overlay2") {
				s.modules++
			}
		}
	}
}

func firstLines(text []byte, n int) string {
	lines := strings.SplitN(strings.TrimSpace(string(text)), "\n", n+1)
	return strings.Join(lines[:min(n, len(lines))], " / ")
}

// worker is a running system.
type worker struct {
	sys    *system
	cmd    *exec.Cmd
	cancel context.CancelFunc
	in     io.WriteCloser
	out    *json.Decoder
	stderr bytes.Buffer
	ended  bool
}

// callLimit is how long one request may take before its system is given up.
const callLimit = 10 * time.Minute

// start starts the worker, behind a prefix such as "strace -c".
func (s *system) start(ctx context.Context, prefix ...string) (*worker, error) {
	args := slices.Concat(prefix, []string{s.program})
	if s.arg != "" {
		args = append(args, s.arg)
	}
	ctx, cancel := context.WithCancel(ctx)
	w := &worker{sys: s, cancel: cancel, cmd: exec.CommandContext(ctx, args[0], args[1:]...)}
	w.cmd.Stderr = &w.stderr
	w.cmd.WaitDelay = time.Second
	in, err := w.cmd.StdinPipe()
	if err != nil {
		cancel()
		return nil, err
	}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		cancel()
		return nil, err
	}
	w.in, w.out = in, json.NewDecoder(out)
	w.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := w.cmd.Start(); err != nil {
		cancel()
		return nil, err
	}
	if err := prefer(w.cmd.Process.Pid); err != nil {
		return nil, errors.Join(err, w.stop())
	}
	return w, nil
}

// prefer gives a session all the weight that the scheduler has for one, so that other
// load on the machine disturbs less. A kernel without session groups (2.6.38,
// SCHED_AUTOGROUP) and a user without the right measure all the same.
func prefer(pid int) error {
	err := os.WriteFile(fmt.Sprintf("/proc/%d/autogroup", pid), []byte("-20"), 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

// errNoCounterpart marks a row that a system cannot have.
var errNoCounterpart = errors.New("no counterpart")

// call sends a request and waits for its answer.
func (w *worker) call(req wire.Request) (wire.Response, error) {
	var res wire.Response
	if err := json.NewEncoder(w.in).Encode(req); err != nil {
		return res, w.died(err)
	}
	timer := time.AfterFunc(callLimit, w.cancel)
	defer timer.Stop()
	if err := w.out.Decode(&res); err != nil {
		return res, w.died(err)
	}
	switch {
	case res.Unsupported:
		return res, errNoCounterpart
	case res.Err != "":
		return res, fmt.Errorf("%s: %s", req.Op, res.Err)
	}
	return res, nil
}

func (w *worker) died(err error) error {
	return fmt.Errorf("worker died: %w: %s", err, firstLines(w.stderr.Bytes(), 3))
}

// stop ends the worker, once.
func (w *worker) stop() error {
	if w.ended {
		return nil
	}
	w.ended = true
	defer w.cancel()
	if err := w.in.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	if err := w.cmd.Wait(); err != nil {
		return w.died(err)
	}
	return nil
}
