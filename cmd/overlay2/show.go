//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"github.com/spf13/cobra"
)

func (a *app) changesCommand() *cobra.Command {
	var parent string
	var tree bool
	cmd := &cobra.Command{
		Use:   "changes ID",
		Short: "list what a layer changes: A added, C changed, D deleted",
		Args:  cobra.ExactArgs(1),
		RunE:  func(_ *cobra.Command, args []string) error { return a.changes(args[0], parent, tree) },
	}
	cmd.Flags().StringVar(&parent, "parent", "", "compare with this layer instead of the one beneath")
	cmd.Flags().BoolVar(&tree, "tree", false, "draw a tree")
	return cmd
}

type changeJSON struct {
	Kind string `json:"kind"`
	Path string `json:"path"`
}

func (a *app) changes(ref, parentRef string, tree bool) error {
	list := []changeJSON{}
	var changes []archive.Change
	err := a.existing(func(d *overlay2.Driver) error {
		l, parent, err := a.pair(ref, parentRef)
		if err != nil {
			return err
		}
		changes, err = d.Changes(l.ID, parent)
		return err
	})
	if err != nil {
		return fmt.Errorf("changes: %w", err)
	}
	for _, c := range changes {
		list = append(list, changeJSON{c.Kind.String(), c.Path})
	}
	return a.result(struct {
		ID      string       `json:"id"`
		Changes []changeJSON `json:"changes"`
	}{ref, list}, func(w io.Writer) error {
		if tree {
			return changesTree(changes).draw(w, isTerminal(w))
		}
		for _, c := range changes {
			if _, err := fmt.Fprintf(w, "%s %s\n", c.Kind, printable(c.Path)); err != nil {
				return err
			}
		}
		return nil
	})
}

// pair returns a layer, and the id of the one it is to be compared with: its parent, or
// what ref, a layer or an image, names.
func (a *app) pair(ref, parentRef string) (*store.Layer, string, error) {
	l, err := a.findLayer(ref)
	if err != nil || parentRef == "" {
		if err != nil {
			return nil, "", err
		}
		return l, l.Parent, nil
	}
	var other store.Layer
	if err := a.resolveParent(&other, parentRef); err != nil {
		return nil, "", err
	}
	return l, other.Parent, nil
}

func (a *app) diffCommand() *cobra.Command {
	var parent, output string
	cmd := &cobra.Command{
		Use:   "diff ID",
		Short: "write a layer's changes as a tar, deletions as whiteouts",
		Args:  cobra.ExactArgs(1),
		RunE:  func(_ *cobra.Command, args []string) error { return a.diff(args[0], parent, output) },
	}
	cmd.Flags().StringVar(&parent, "parent", "", "compare with this layer instead of the one beneath")
	cmd.Flags().StringVarP(&output, "output", "o", "-", "file to write; - is standard output")
	return cmd
}

func (a *app) diff(ref, parentRef, output string) error {
	if output == "" {
		return usagef("diff: the output's name is empty")
	}
	if output == "-" && isTerminal(a.out) {
		return usagef("diff: a tar is not for a terminal: redirect it, or name a file with -o")
	}
	if output == "-" && a.json {
		return usagef("diff: --json needs -o: standard output is the tar's")
	}
	var n int64
	err := a.existing(func(d *overlay2.Driver) (err error) {
		l, parent, err := a.pair(ref, parentRef)
		if err != nil {
			return err
		}
		r, err := d.Diff(l.ID, parent)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, r.Close()) }()
		if output == "-" {
			n, err = a.copy(a.out, r)
			return err
		}
		n, err = a.copyToFile(output, r)
		return err
	})
	if err != nil {
		return fmt.Errorf("diff: %w", err)
	}
	if output == "-" {
		return nil
	}
	return a.result(struct {
		ID    string `json:"id"`
		File  string `json:"file"`
		Bytes int64  `json:"bytes"`
	}{ref, output, n}, line("%s  %s", output, human(n)))
}

// copy copies until the end, or until somebody presses Ctrl-C.
func (a *app) copy(w io.Writer, r io.Reader) (int64, error) {
	return io.CopyBuffer(plainWriter{w}, contextReader{a.ctx.Err, r}, make([]byte, 1<<20))
}

// plainWriter hides a file's ReadFrom, which would make small reads.
type plainWriter struct{ io.Writer }

type contextReader struct {
	ended func() error
	io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ended(); err != nil {
		return 0, err
	}
	return c.Reader.Read(p)
}

// copyToFile writes r to path, under another name until it is whole. What is no regular
// file (a pipe, /dev/null) is written as it is.
func (a *app) copyToFile(path string, r io.Reader) (n int64, err error) {
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return 0, err
		}
		n, err := a.copy(f, r)
		return n, errors.Join(err, f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".")
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	n, err = a.copy(f, r)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return n, err
	}
	return n, os.Rename(f.Name(), path)
}

// node is a directory or file in a drawn tree.
type node struct {
	label    string
	children []*node
	index    map[string]*node
}

// child returns the child of this name, made if needed. Children stay in the order of making.
func (n *node) child(name string) *node {
	if c := n.index[name]; c != nil {
		return c
	}
	c := &node{label: printable(name)}
	if n.index == nil {
		n.index = map[string]*node{}
	}
	n.index[name] = c
	n.children = append(n.children, c)
	return c
}

// draw writes the node's children with lines, plain ASCII unless a person looks on.
func (n *node) draw(w io.Writer, fancy bool) error {
	mid, last, down, none := "|-- ", "`-- ", "|   ", "    "
	if fancy {
		mid, last, down = "├── ", "└── ", "│   "
	}
	type item struct {
		n       *node
		prefix  string
		isFinal bool
	}
	var stack []item
	push := func(n *node, prefix string) {
		for i := len(n.children) - 1; i >= 0; i-- {
			stack = append(stack, item{n.children[i], prefix, i == len(n.children)-1})
		}
	}
	if n.label != "" {
		if _, err := fmt.Fprintln(w, n.label); err != nil {
			return err
		}
	}
	push(n, "")
	for len(stack) > 0 {
		it := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		branch, next := mid, down
		if it.isFinal {
			branch, next = last, none
		}
		if _, err := fmt.Fprintln(w, it.prefix+branch+it.n.label); err != nil {
			return err
		}
		push(it.n, it.prefix+next)
	}
	return nil
}

// changesTree makes a tree of paths. Directories that are only on the way have no letter.
func changesTree(changes []archive.Change) *node {
	root := &node{label: "/"}
	for _, c := range changes {
		n := root
		for _, part := range strings.Split(strings.Trim(c.Path, "/"), "/") {
			n = n.child(part)
		}
		n.label = c.Kind.String() + " " + n.label
	}
	return root
}
