package main

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A reader that goes away ends the command, and not before it has cleaned up.
func TestReaderGoesAway(t *testing.T) {
	o := newTool(t)
	layers := o.imported()
	box := o.mount("box", "a")
	must(t, os.WriteFile(filepath.Join(box, "big"), make([]byte, 3<<20), 0o600))
	o.do("umount", "box")
	for _, args := range [][]string{{"export", "a", "--to", "-", "--compress", "none"}, {"diff", "box", "--parent", layers[0]}} {
		cmd := o.process(args...)
		r, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		_, err = bufio.NewReaderSize(r, 16).ReadByte()
		must(t, err)
		must(t, r.Close())
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != exitPipe {
			t.Errorf("%v: %v", args, err)
		}
	}
	o.noTemp()
	o.do("rm", "box")
	o.do("rm", "a")
	o.empty()
}

// noTemp checks that no temporary file is left.
func (o *tool) noTemp() {
	o.t.Helper()
	left, err := os.ReadDir(filepath.Join(o.root, "tmp"))
	must(o.t, err)
	if len(left) > 0 {
		o.t.Errorf("left: %v", left)
	}
}

// What a kill leaves in tmp the next command removes that takes the lock, but nothing that somebody is using.
func TestKilledExport(t *testing.T) {
	o := newTool(t)
	o.imported()
	start := func() *exec.Cmd {
		cmd := o.process("export", "a", "--to", "-", "--compress", "none")
		r, err := cmd.StdoutPipe()
		must(t, err)
		t.Cleanup(func() { _ = r.Close() })
		must(t, cmd.Start())
		_, err = bufio.NewReaderSize(r, 16).ReadByte()
		must(t, err)
		return cmd
	}
	killed, living := start(), start()
	must(t, killed.Process.Kill())
	if err := killed.Wait(); err == nil {
		t.Fatal("it was quicker than the kill")
	}
	o.do("create", "box")
	left, err := os.ReadDir(filepath.Join(o.root, "tmp"))
	must(t, err)
	if len(left) != 1 {
		t.Errorf("there are %v", left)
	}
	must(t, living.Process.Signal(unix.SIGTERM))
	done := make(chan error, 1)
	go func() { done <- living.Wait() }()
	select {
	case <-done:
	case <-time.After(2 * time.Second): // it waits for its reader
		must(t, living.Process.Kill())
		<-done
	}
	o.do("rm", "box", "a")
	o.noTemp()
	o.empty()
}
