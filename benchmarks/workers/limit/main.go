//go:build linux

// Command limit is the yardsticks behind the harness's protocol: limit1 (one thread),
// limitN (with workers), tar (GNU tar) and cp (cp -a of an unpacked tree).
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"

	"github.com/bcc2decd/overlay2/benchmarks/limit"
	"github.com/bcc2decd/overlay2/benchmarks/wire"
)

func main() {
	systems := map[string]wire.System{
		"limit1": store{limit.NewStore(0)},
		"limitN": store{limit.NewStore(2)},
		"tar":    gnutar{outside{limit.NewStore(0)}},
		"cp":     cp{outside{limit.NewStore(0)}},
	}
	if len(os.Args) != 2 || systems[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: limit limit1|limitN|tar|cp")
		os.Exit(2)
	}
	wire.Main(systems[os.Args[1]])
}

type store struct{ *limit.Store }

type changes []limit.Change

func (c changes) Len() int { return len(c) }

func (c changes) Line(i int) string { return string(c[i].Kind) + " " + c[i].Path }

func (s store) Changes(id, parent string) (wire.Changes, error) {
	list, err := s.ChangesOf(id, parent)
	return changes(list), err
}

// outside has the methods that a program outside has no counterpart for.
type outside struct{ *limit.Store }

func (outside) Apply(string, string, io.Reader) (int64, error) { return 0, errors.ErrUnsupported }
func (outside) WriteDiff(string, string, io.Writer) error      { return errors.ErrUnsupported }
func (outside) DiffSize(string, string) (int64, error)         { return 0, errors.ErrUnsupported }
func (outside) Changes(string, string) (wire.Changes, error)   { return nil, errors.ErrUnsupported }
func (outside) Get(string) (string, error)                     { return "", errors.ErrUnsupported }
func (outside) Put(string) error                               { return errors.ErrUnsupported }

type gnutar struct{ outside }

func (g gnutar) Apply(id, _ string, tar io.Reader) (int64, error) {
	dir, err := g.Upper(id)
	if err != nil {
		return 0, err
	}
	cmd := exec.Command("tar", "--extract", "--numeric-owner", "--preserve-permissions", "--directory", dir, "--file=-")
	cmd.Stdin, cmd.Stderr = tar, os.Stderr
	return 0, cmd.Run()
}

func (g gnutar) WriteDiff(id, _ string, w io.Writer) error {
	dir, err := g.Upper(id)
	if err != nil {
		return err
	}
	cmd := exec.Command("tar", "--create", "--sort=name", "--numeric-owner", "--directory", dir, "--file=-", ".")
	cmd.Stdout, cmd.Stderr = w, os.Stderr
	return cmd.Run()
}

type cp struct{ outside }

// ApplyTree copies an unpacked tree, where the others unpack the tar of it.
func (c cp) ApplyTree(id, tree string) error {
	dir, err := c.Upper(id)
	if err != nil {
		return err
	}
	cmd := exec.Command("cp", "--archive", tree+"/.", dir)
	cmd.Stderr = os.Stderr
	return cmd.Run()
}
