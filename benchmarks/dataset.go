//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// dataset is a tar and what must come out of it.
type dataset struct {
	name string
	tar  string
	// line is what the script printed: sha256, bytes, entries, name.
	line    string
	entries int
	bytes   int64

	tree string   // unpacked by GNU tar, the independent witness
	want []string // its manifest
}

// makeData runs the script for one set, which keeps a set that is there already.
func makeData(ctx context.Context, root, dir, name string) (*dataset, error) {
	cmd := exec.CommandContext(ctx, "bash", filepath.Join(root, "data/make.sh"), dir, name)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("data %s: %w", name, err)
	}
	d := &dataset{name: name, tar: filepath.Join(dir, name+".tar"), line: strings.TrimSpace(string(out))}
	var sum string
	if _, err := fmt.Sscan(d.line, &sum, &d.bytes, &d.entries); err != nil {
		return nil, fmt.Errorf("data %s: the script said %q: %w", name, d.line, err)
	}
	err = d.warm()
	return d, err
}

// warm reads the tar once, so that no run pays for the disk.
func (d *dataset) warm() error {
	f, err := os.Open(d.tar)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(struct{ io.Writer }{io.Discard}, f)
	return err
}

// witness unpacks the tar below dir with GNU tar and takes its manifest.
func (d *dataset) witness(dir string) (err error) {
	d.tree = filepath.Join(dir, d.name)
	if err := untar(d.tar, d.tree); err != nil {
		return err
	}
	d.want, err = manifest(d.tree)
	return err
}

func untar(file, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return run("tar", "--extract", "--numeric-owner", "--preserve-permissions", "--directory", dir, "--file", file)
}
