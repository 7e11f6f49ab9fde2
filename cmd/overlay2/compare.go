//go:build linux

package main

import (
	"fmt"
	"io"

	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/tree"
	"github.com/spf13/cobra"
)

func (a *app) compareCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "compare DIR DIR",
		Short:  "compare two trees: content, mode, owner, times, xattrs, devices, hard links",
		Hidden: true, // it knows nothing of layers; make demo uses it
		Args:   cobra.ExactArgs(2),
		RunE:   func(_ *cobra.Command, args []string) error { return a.compare(args[0], args[1]) },
	}
}

func (a *app) compare(first, second string) error {
	x, totals, err := tree.Read(a.ctx, first)
	if err != nil {
		return fmt.Errorf("compare: %w", err)
	}
	y, _, err := tree.Read(a.ctx, second)
	if err != nil {
		return fmt.Errorf("compare: %w", err)
	}
	diffs := append([]string{}, tree.Diff(x, y)...)
	err = a.result(struct {
		Files       int      `json:"files"`
		Directories int      `json:"directories"`
		Symlinks    int      `json:"symlinks"`
		Others      int      `json:"others"`
		Bytes       int64    `json:"bytes"`
		Differences []string `json:"differences"`
	}{totals.Files, totals.Dirs, totals.Links, totals.Others, totals.Bytes, diffs}, func(w io.Writer) error {
		for _, d := range diffs {
			if _, err := fmt.Fprintln(w, d); err != nil {
				return err
			}
		}
		if len(diffs) > 0 {
			return nil
		}
		return line("equal: %d files with %s, %d directories, %d symlinks, %d others",
			totals.Files, human(totals.Bytes), totals.Dirs, totals.Links, totals.Others)(w)
	})
	if err == nil && len(diffs) > 0 {
		return fmt.Errorf("compare: %d differences %w", len(diffs), errFound)
	}
	return err
}
