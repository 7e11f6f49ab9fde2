//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"text/tabwriter"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"github.com/spf13/cobra"
)

func (a *app) infoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "info",
		Short: "show the driver, its filesystem, and what the kernel can do",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return a.info() },
	}
}

func (a *app) info() error {
	// Looking at a root that is not there makes it: only so the filesystem can be probed.
	var status [][2]string
	err := a.locked(func(d *overlay2.Driver) error {
		status = d.Status()
		return nil
	})
	if err != nil {
		return fmt.Errorf("info: %w", err)
	}
	l, err := a.listing()
	if err != nil {
		return fmt.Errorf("info: %w", err)
	}
	facts := map[string]string{}
	for _, s := range status {
		facts[s[0]] = s[1]
	}
	return a.result(struct {
		Driver  string            `json:"driver"`
		Version string            `json:"version"`
		Root    string            `json:"root"`
		Images  int               `json:"images"`
		Layers  int               `json:"layers"`
		Status  map[string]string `json:"status"`
	}{"overlay2", version(), a.root, len(l.Images), len(l.Layers), facts}, func(w io.Writer) error {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintf(t, "Driver\toverlay2\nVersion\t%s\nRoot\t%s\nImages\t%d\nLayers\t%d\n", version(), a.root, len(l.Images), len(l.Layers))
		for _, s := range status {
			fmt.Fprintf(t, "%s\t%s\n", s[0], s[1])
		}
		return t.Flush()
	})
}

func (a *app) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "look for damage, and for image layers that nothing needs; exit code 1 if there is any",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return a.check() },
	}
}

type problem struct {
	Where   string `json:"where"`
	Problem string `json:"problem"`
}

func (a *app) check() error {
	problems := []problem{}
	var unread error // what cannot be read is told after what can
	err := a.existingLocked(func(d *overlay2.Driver) error {
		var found []overlay2.Problem
		found, unread = d.Check()
		for _, p := range found {
			problems = append(problems, problem{p.Path, p.Err.Error()})
		}
		return a.checkRecords(d, &problems)
	})
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	err = a.result(struct {
		Problems []problem `json:"problems"`
	}{problems}, func(w io.Writer) error {
		for _, p := range problems {
			if _, err := fmt.Fprintf(w, "%s: %s\n", printable(p.Where), printable(p.Problem)); err != nil {
				return err
			}
		}
		if len(problems) == 0 && unread == nil {
			return line("no problems")(w)
		}
		return nil
	})
	if err == nil && unread != nil {
		return fmt.Errorf("check: %w", unread)
	}
	if err == nil && len(problems) > 0 {
		return fmt.Errorf("check: %d problems %w", len(problems), errFound)
	}
	return err
}

// errFound makes check, verify and compare end with code 1.
var errFound = errors.New("found")

// checkRecords compares the tool's records with the driver's layers.
func (a *app) checkRecords(d *overlay2.Driver, problems *[]problem) error {
	add := func(where, format string, args ...any) {
		*problems = append(*problems, problem{where, fmt.Sprintf(format, args...)})
	}
	images, damaged, err := a.store.Images()
	if err != nil {
		return err
	}
	for _, i := range damaged {
		add(i.Name, "%v", i.Err)
	}
	layers, err := a.store.Layers()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, l := range layers {
		known[l.ID] = true
		switch {
		case l.Pending:
			add(l.ID, "it was never finished: import again, or remove it with rm")
		case !d.Exists(l.ID):
			add(l.ID, "recorded, but the layer is gone")
		}
	}
	for _, l := range layers {
		if l.Parent != "" && !known[l.Parent] {
			add(l.ID, "its parent %s is not recorded", short(l.Parent))
		}
	}
	for _, i := range images {
		for _, id := range i.Layers {
			if !known[id] {
				add(i.Name, "its layer %s is not recorded", short(id))
			}
		}
	}
	if !slices.ContainsFunc(damaged, func(i store.Damaged) bool { return i.Layers == nil }) {
		for _, id := range orphans(images, damaged, layers) {
			add(id, "nothing needs it: rm removes it")
		}
	}
	entries, err := os.ReadDir(a.store.Home())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if d.Exists(e.Name()) && !known[e.Name()] {
			if _, err := d.GetMetadata(e.Name()); !errors.Is(err, overlay2.ErrInvalidID) {
				add(e.Name(), "a layer without a record")
			}
		}
	}
	return err
}

// orphans returns the image layers that neither an image nor a container lies on: what was interrupted may leave them.
func orphans(images []*store.Image, damaged []store.Damaged, layers []*store.Layer) (ids []string) {
	needed, parents := map[string]bool{}, map[string]string{}
	for _, i := range images {
		for _, id := range i.Layers {
			needed[id] = true
		}
	}
	for _, i := range damaged {
		for _, id := range i.Layers {
			needed[id] = true
		}
	}
	for _, l := range layers {
		parents[l.ID] = l.Parent
	}
	for _, l := range layers {
		// One that was never finished is told already.
		if l.Kind == store.KindContainer || l.Pending {
			for id := l.ID; id != "" && !needed[id]; id = parents[id] {
				needed[id] = true
			}
		}
	}
	for _, l := range layers {
		if !needed[l.ID] {
			ids = append(ids, l.ID)
		}
	}
	return ids
}
