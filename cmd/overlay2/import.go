//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/store"
	"github.com/spf13/cobra"
)

// importFlags are the flags of import.
type importFlags struct {
	name, ref, platform, kind string
	replace                   bool
}

func (a *app) importCommand() *cobra.Command {
	var f importFlags
	cmd := &cobra.Command{
		Use:   "import SOURCE",
		Short: "import an image: OCI layout, OCI or docker-save archive, root filesystem tar",
		Long: `import reads an image from SOURCE and keeps its layers. SOURCE is an OCI layout (a
directory or a tar of one), an archive of docker save, or the tar of a root filesystem;
"-" is standard input. Archives and layers may be plain or compressed with gzip or zstd;
what SOURCE is, its content decides.

Sizes, digests and diff ids are verified while the layers are unpacked. If anything is
wrong nothing of the image is left; of several images those before it stay. A layer that
is there already, over the same layers, is not read again.`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return a.importImage(args[0], f) },
	}
	cmd.Flags().StringVar(&f.name, "name", "", "the image's name here (default: the one SOURCE gives, or SOURCE's)")
	cmd.Flags().StringVar(&f.ref, "ref", "", "import only the image of this name in SOURCE")
	cmd.Flags().StringVar(&f.platform, "platform", "", "os/arch[/variant] to choose from an index (default: this machine)")
	cmd.Flags().StringVar(&f.kind, "type", "", "oci, docker or rootfs, instead of looking")
	cmd.Flags().BoolVar(&a.digests, "record-digests", false, "record a digest of each file that is unpacked, for verify")
	cmd.Flags().BoolVar(&f.replace, "replace", false, "give the name to this image if another has it")
	return cmd
}

// imported is import's result for one image.
type imported struct {
	Name   string          `json:"name"`
	ID     string          `json:"id"`
	Layers []importedLayer `json:"layers"`
}

type importedLayer struct {
	ID     string `json:"id"`
	DiffID string `json:"diffID"`
	Size   int64  `json:"size"`
	New    bool   `json:"new"`
}

func (a *app) importImage(source string, f importFlags) (err error) {
	switch f.kind {
	case "", image.KindOCI, image.KindDocker, image.KindRootfs:
	default:
		return usagef("unknown type %q: oci, docker or rootfs", f.kind)
	}
	platform, err := image.ParsePlatform(f.platform)
	if err != nil {
		return usageError{err}
	}
	if f.name != "" {
		if err := store.CheckImageName(f.name); err != nil {
			return err
		}
	}
	total := int64(0)
	if source != "-" {
		st, err := os.Stat(source)
		if err != nil {
			return fmt.Errorf("import: %w", err)
		}
		if st.Mode().IsRegular() {
			total = st.Size()
		}
	}
	if err := a.store.Init(); err != nil {
		return err
	}
	bars := a.newProgress()
	defer bars.wait()
	// What has to be laid out or hashed beforehand is, before anybody is kept waiting by the lock.
	var looking bar
	src, err := image.Open(a.ctx, source, image.Options{
		Kind: f.kind, Platform: platform, Ref: f.ref, TempDir: a.store.Temp(), Stdin: a.in,
		Progress: func(n int64) {
			if looking.bar == nil {
				looking = bars.add("reading", total)
			}
			looking.set(n)
		},
	})
	looking.done(err)
	if err != nil {
		return fmt.Errorf("import %s: %w", source, err)
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	named, err := nameImages(src, source, f)
	if err != nil {
		return err
	}
	var results []imported
	err = a.locked(func(d *overlay2.Driver) error {
		for _, n := range named {
			r, err := a.importOne(d, bars, n.name, n.img, f.replace)
			if err != nil {
				return fmt.Errorf("import %s: %w", source, err)
			}
			results = append(results, r)
		}
		return nil
	})
	bars.wait()
	if err != nil {
		return err
	}
	return a.result(struct {
		Images []imported `json:"images"`
	}{results}, func(w io.Writer) error { return importText(w, results) })
}

func importText(w io.Writer, results []imported) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range results {
		fresh, size := 0, int64(0)
		for _, l := range r.Layers {
			size += l.Size
			if l.New {
				fresh++
			}
		}
		if _, err := fmt.Fprintf(t, "%s\t%s\t%d layers, %d new\t%s\n", r.Name, short(r.ID), len(r.Layers), fresh, human(size)); err != nil {
			return err
		}
	}
	return t.Flush()
}

type namedImage struct {
	name string
	img  *image.Image
}

// nameImages chooses the images and their names.
func nameImages(src *image.Source, source string, f importFlags) ([]namedImage, error) {
	images := src.Images
	if f.ref != "" {
		images = slices.DeleteFunc(slices.Clone(images), func(i *image.Image) bool { return !slices.Contains(i.Names, f.ref) })
		if len(images) == 0 {
			return nil, fmt.Errorf("import %s: image %q %w; there are: %s", source, f.ref, store.ErrNotFound, sourceNames(src))
		}
	}
	if f.name != "" {
		if len(images) != 1 {
			return nil, usagef("import %s: one name for %d images; choose one by --ref: %s", source, len(images), sourceNames(src))
		}
		return []namedImage{{f.name, images[0]}}, nil
	}
	var named []namedImage
	for _, img := range images {
		names := img.Names
		if f.ref != "" {
			names = []string{f.ref}
		}
		if len(names) == 0 {
			names = []string{""}
		}
		for _, n := range names {
			name := fullName(n, source)
			if err := store.CheckImageName(name); err != nil {
				return nil, fmt.Errorf("%w (give one by --name)", err)
			}
			for _, have := range named {
				if have.name == name {
					return nil, usagef("import %s: two images named %q; choose one by --ref or --platform", source, name)
				}
			}
			named = append(named, namedImage{name, img})
		}
	}
	return named, nil
}

func sourceNames(src *image.Source) string {
	var names []string
	for _, i := range src.Images {
		for _, n := range i.Names {
			names = append(names, fmt.Sprintf("%q", n))
		}
	}
	return strings.Join(names, ", ")
}

// fullName makes a name of what the source has: nothing, a bare tag, or a reference.
func fullName(name, source string) string {
	if strings.ContainsAny(name, ":/") {
		return name
	}
	base := filepath.Base(filepath.Clean(source))
	if source == "-" {
		base = "stdin"
	}
	for _, suffix := range []string{".gz", ".tgz", ".zst", ".tar"} {
		base = strings.TrimSuffix(base, suffix)
	}
	if name == "" {
		name = "latest"
	}
	return base + ":" + name
}

// importOne brings one image's layers in, and names it. A failure removes what it made.
func (a *app) importOne(d *overlay2.Driver, bars *progress, name string, img *image.Image, replace bool) (r imported, err error) {
	r = imported{Name: name, ID: img.ConfigDigest.Encoded(), Layers: []importedLayer{}}
	old, err := a.store.Image(name)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return r, err
	}
	if old != nil && old.ID != img.ConfigDigest && !replace {
		return r, fmt.Errorf("another image named %q %w (use --replace)", name, store.ErrExists)
	}
	replaced, err := a.checkReplaced(d, old, img)
	if err != nil {
		return r, err
	}
	var made []string
	defer func() {
		if err != nil {
			err = errors.Join(err, a.removeLayers(d, made))
		}
	}()
	record := &store.Image{Name: name, ID: img.ConfigDigest, Config: store.Config(img.Config), Layers: []string{}, Imported: now()}
	parent := ""
	for i, l := range img.Layers {
		id := l.ChainID.Encoded()
		have, again, err := a.haveLayer(d, id, parent, l.DiffID)
		if err != nil {
			return r, err
		}
		fresh := have == nil
		if fresh {
			b := bars.add(fmt.Sprintf("layer %d/%d", i+1, len(img.Layers)), l.Size)
			have, err = a.addLayer(d, id, parent, l, again, b)
			b.done(err)
			if err != nil {
				return r, err
			}
			if !again { // others may need one that was there
				made = append(made, id)
			}
		}
		record.Layers = append(record.Layers, id)
		r.Layers = append(r.Layers, importedLayer{id, l.DiffID.String(), have.Size, fresh})
		parent = id
	}
	// The image's record promises that its layers are there, after a power cut too; those as well that were found, which
	// may be of an import that was killed before it came here.
	if err := a.store.Sync(); err != nil {
		return r, err
	}
	if err := a.store.PutImage(record); err != nil {
		return r, err
	}
	made = nil // they have their name now, whatever comes
	return r, a.removeLayers(d, replaced)
}

// checkReplaced returns the layers of the image old, which may be nil, that nothing needs once img has its name. They are free.
func (a *app) checkReplaced(d *overlay2.Driver, old *store.Image, img *image.Image) ([]string, error) {
	if old == nil || old.ID == img.ConfigDigest {
		return nil, nil
	}
	var keep []string
	for _, l := range img.Layers {
		keep = append(keep, l.ChainID.Encoded())
	}
	gone, err := a.unneeded(old, keep...)
	if err != nil {
		return nil, err
	}
	return gone, a.checkFree(d, gone, false)
}
