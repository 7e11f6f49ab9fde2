//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/bcc2decd/overlay2/benchmarks/wire"
)

// calls counts the system calls of one ApplyDiff: those of a worker that does one, less
// those of a worker that stops short of it.
func (b *bench) calls(data *dataset) error {
	if found, _ := exec.LookPath("strace"); found == "" {
		b.log("no count of system calls: strace is not installed")
		return nil
	}
	for _, s := range b.systems {
		if s.broken != "" {
			continue
		}
		k := key{Row: rowApplyCalls, Data: data.name, FS: "tmpfs", System: s.name}
		with, err := b.traced(s, data, true)
		if err != nil {
			b.results.fail(k, unitCalls, err)
			continue
		}
		without, err := b.traced(s, data, false)
		if err != nil {
			b.results.fail(k, unitCalls, err)
			continue
		}
		b.results.add(k, unitCalls, float64(with-without)/float64(data.entries))
	}
	return b.ctx.Err()
}

func (b *bench) traced(s *system, data *dataset, apply bool) (total int, err error) {
	dir, free, err := b.scratch.fresh("tmpfs")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, free()) }()
	out := filepath.Join(dir, "strace")
	w, err := s.start(b.ctx, "strace", "-c", "-f", "-o", out)
	if err != nil {
		return 0, err
	}
	requests := []wire.Request{{Op: wire.OpOpen, Home: filepath.Join(dir, "h")}, {Op: wire.OpCreate, ID: "base"}}
	if apply {
		requests = append(requests, wire.Request{Op: wire.OpApply, ID: "base", Tar: data.tar, Tree: data.tree})
	}
	for _, req := range requests {
		if _, err := w.call(req); err != nil {
			return 0, errors.Join(err, w.stop())
		}
	}
	if err := w.stop(); err != nil {
		return 0, err
	}
	text, err := os.ReadFile(out)
	if err != nil {
		return 0, err
	}
	// The last line: percent, seconds, microseconds a call, calls, perhaps errors, "total".
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) >= 5 && f[len(f)-1] == "total" {
			return strconv.Atoi(f[3])
		}
	}
	return 0, fmt.Errorf("strace of %s printed no total", s.name)
}

// imports says how large and how many modules a program becomes that imports a system.
func (b *bench) imports() {
	for _, s := range b.systems {
		if s.broken == "" && (s.role == ours || s.role == peer) {
			b.results.add(key{Row: rowSize, System: s.name}, unitBytes, float64(s.size))
			b.results.add(key{Row: rowModules, System: s.name}, unitCount, float64(s.modules))
		}
	}
}
