//go:build linux

package main

import (
	"cmp"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"github.com/spf13/cobra"
)

func (a *app) lsCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "list images and layers",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			l, err := a.listing()
			if err != nil {
				return fmt.Errorf("ls: %w", err)
			}
			return a.result(l, l.text)
		},
	}
}

// listing is what ls shows.
type listing struct {
	Images []listedImage `json:"images"`
	Layers []listedLayer `json:"layers"`
}

type listedImage struct {
	Name     string    `json:"name"`
	ID       string    `json:"id"`
	Layers   []string  `json:"layers"`
	Size     int64     `json:"size"`
	Imported time.Time `json:"imported"`
}

type listedLayer struct {
	ID      string `json:"id"`
	Parent  string `json:"parent,omitempty"`
	Kind    string `json:"kind"`
	Image   string `json:"image,omitempty"`
	DiffID  string `json:"diffID,omitempty"`
	Size    int64  `json:"size"`
	Mounted bool   `json:"mounted"`
	// Paths are where it is mounted.
	Paths   []string  `json:"paths,omitempty"`
	Pending bool      `json:"pending,omitempty"`
	Created time.Time `json:"created"`
}

// listing reads the records and the mount table. It needs no lock and opens no driver, so
// that it answers while an import is running.
func (a *app) listing() (*listing, error) {
	images, damaged, err := a.store.Images()
	if err != nil {
		return nil, err
	}
	for _, i := range damaged {
		a.remark("image %s: %v", i.Name, i.Err)
	}
	layers, err := a.store.Layers()
	if err != nil {
		return nil, err
	}
	points, err := mountPoints()
	if err != nil {
		return nil, err
	}
	home := a.store.Home()
	if real, err := filepath.EvalSymlinks(home); err == nil {
		home = real
	}
	l := &listing{Images: []listedImage{}, Layers: []listedLayer{}}
	sizes := map[string]int64{}
	for _, s := range layers {
		sizes[s.ID] = s.Size
		e := listedLayer{ID: s.ID, Parent: s.Parent, Kind: s.Kind, Image: s.Image, DiffID: s.DiffID.String(), Size: s.Size, Pending: s.Pending, Created: s.Created}
		// The on-disk format is Docker's: a layer is mounted on its directory merged.
		for _, p := range append([]string{filepath.Join(home, s.ID, "merged")}, s.Binds...) {
			if points[p] {
				e.Paths = append(e.Paths, p)
			}
		}
		e.Mounted = len(e.Paths) > 0
		l.Layers = append(l.Layers, e)
	}
	for _, i := range images {
		e := listedImage{Name: i.Name, ID: i.ID.Encoded(), Layers: i.Layers, Imported: i.Imported}
		for _, id := range i.Layers {
			e.Size += sizes[id]
		}
		l.Images = append(l.Images, e)
	}
	return l, nil
}

func (l *listing) text(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "IMAGE\tID\tLAYERS\tSIZE\tIMPORTED\n")
	for _, i := range l.Images {
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\n", i.Name, short(i.ID), len(i.Layers), human(i.Size), i.Imported.Local().Format(time.DateTime))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(t, "\nLAYER\tPARENT\tKIND\tSIZE\tSTATE\n")
	for _, s := range l.Layers {
		parent, state := "-", "-"
		if s.Parent != "" {
			parent = short(s.Parent)
		}
		if s.Pending {
			state = "unfinished"
		} else if s.Mounted {
			state = "mounted"
		}
		size := human(s.Size)
		if s.Kind == store.KindContainer {
			size = "-" // it grows as it is written to; diff tells
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", short(s.ID), parent, s.Kind, size, state)
	}
	return t.Flush()
}

func (a *app) treeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "tree",
		Short: "draw the layers as a tree",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			l, err := a.listing()
			if err != nil {
				return fmt.Errorf("tree: %w", err)
			}
			roots := l.tree()
			return a.result(roots, func(w io.Writer) error {
				top := &node{}
				for _, r := range roots {
					top.children = append(top.children, r.node())
				}
				if len(roots) == 0 {
					return nil
				}
				top.label = a.root
				return top.draw(w, isTerminal(w))
			})
		},
	}
}

// layerTree is a layer with those above it.
type layerTree struct {
	ID       string       `json:"id"`
	Kind     string       `json:"kind"`
	Size     int64        `json:"size"`
	Images   []string     `json:"images,omitempty"`
	Mounted  bool         `json:"mounted"`
	Children []*layerTree `json:"children,omitempty"`
}

func (l *listing) tree() []*layerTree {
	all := map[string]*layerTree{}
	for _, s := range l.Layers {
		all[s.ID] = &layerTree{ID: s.ID, Kind: s.Kind, Size: s.Size, Mounted: s.Mounted}
	}
	for _, i := range l.Images {
		if n := len(i.Layers); n > 0 && all[i.Layers[n-1]] != nil {
			t := all[i.Layers[n-1]]
			t.Images = append(t.Images, i.Name)
		}
	}
	roots := []*layerTree{}
	for _, s := range l.Layers {
		if p := all[s.Parent]; p != nil {
			p.Children = append(p.Children, all[s.ID])
		} else {
			roots = append(roots, all[s.ID]) // also one whose parent is gone: it is to be seen
		}
	}
	for _, t := range all {
		slices.SortFunc(t.Children, func(x, y *layerTree) int { return cmp.Or(cmp.Compare(x.Kind, y.Kind), cmp.Compare(x.ID, y.ID)) })
	}
	return roots
}

func (t *layerTree) node() *node {
	n := &node{label: short(t.ID)}
	if t.Kind == store.KindImage {
		n.label += "  " + human(t.Size)
	} else {
		n.label += "  read-write"
	}
	if t.Mounted {
		n.label += ", mounted"
	}
	if len(t.Images) > 0 {
		n.label += "  [" + strings.Join(t.Images, ", ") + "]"
	}
	for _, c := range t.Children {
		n.children = append(n.children, c.node())
	}
	return n
}
