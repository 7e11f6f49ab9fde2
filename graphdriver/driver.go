//go:build linux

// Package graphdriver makes [overlay2.Driver] a storage driver of Docker's daemon.
//
// A daemon that is built with it registers it by a name of its choice, before it starts:
//
//	func main() {
//		if err := graphdriver.Register("fastoverlay"); err != nil {
//			log.Fatal(err)
//		}
//		// ... moby's daemon command; run with --storage-driver fastoverlay
//	}
//
// The daemon's options for it are those of overlay2.ParseOptions, "overlay2.size=10G" and the like. A home that the daemon's
// own overlay2 driver has written opens here, and the other way round: name and directory are all that differ.
package graphdriver

import (
	"fmt"
	"io"
	"math"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/archive"
	dockerarchive "github.com/moby/go-archive"
	"github.com/moby/moby/v2/daemon/graphdriver"
	"github.com/moby/sys/user"
)

// Driver is an overlay2.Driver with the methods that Docker's daemon calls.
type Driver struct{ *overlay2.Driver }

var _ graphdriver.DiffGetterDriver = Driver{}

// Register makes the driver known to the daemon under name. A name that is taken is an error.
func Register(name string) error {
	if err := graphdriver.Register(name, Init); err != nil {
		return fmt.Errorf("register %s: %w", name, err)
	}
	return nil
}

// Init opens the home directory root, as the daemon does. What the kernel or the filesystem cannot do
// has the method NotSupported, by which the daemon tells it from other errors.
func Init(root string, options []string, idMap user.IdentityMapping) (graphdriver.Driver, error) {
	uids, err := ranges(idMap.UIDMaps)
	if err != nil {
		return nil, err
	}
	gids, err := ranges(idMap.GIDMaps)
	if err != nil {
		return nil, err
	}
	d, err := overlay2.Init(root, options, archive.IDMap{UIDs: uids, GIDs: gids})
	if err != nil {
		return nil, err
	}
	return Driver{d}, nil
}

// ranges translates an id map from Docker's form, whose numbers can be any.
func ranges(maps []user.IDMap) (r []archive.IDRange, err error) {
	for _, m := range maps {
		for _, n := range []int64{m.ID, m.ParentID, m.Count} {
			if n < 0 || n > math.MaxUint32 {
				return nil, fmt.Errorf("%w: id map with %d", overlay2.ErrInvalidOption, n)
			}
		}
		r = append(r, archive.IDRange{ContainerID: uint32(m.ID), HostID: uint32(m.ParentID), Size: uint32(m.Count)})
	}
	return r, nil
}

// Create makes a layer of an image.
func (d Driver) Create(id, parent string, opts *graphdriver.CreateOpts) error {
	return d.Driver.Create(id, parent, createOpts(opts))
}

// CreateReadWrite makes the layer of a container.
func (d Driver) CreateReadWrite(id, parent string, opts *graphdriver.CreateOpts) error {
	return d.Driver.CreateReadWrite(id, parent, createOpts(opts))
}

func createOpts(opts *graphdriver.CreateOpts) *overlay2.CreateOpts {
	if opts == nil {
		return nil
	}
	return &overlay2.CreateOpts{MountLabel: opts.MountLabel, StorageOpt: opts.StorageOpt}
}

// Changes lists what a layer changes of its parent. The kinds have the same values in both.
func (d Driver) Changes(id, parent string) ([]dockerarchive.Change, error) {
	list, err := d.Driver.Changes(id, parent)
	if err != nil {
		return nil, err
	}
	changes := make([]dockerarchive.Change, len(list))
	for i, c := range list {
		changes[i] = dockerarchive.Change{Path: c.Path, Kind: dockerarchive.ChangeType(c.Kind)}
	}
	return changes, nil
}

// DiffGetter opens a layer for reading single files, from which the daemon puts a layer's original tar together.
func (d Driver) DiffGetter(id string) (graphdriver.FileGetCloser, error) {
	files, err := d.Files(id)
	if err != nil {
		return nil, err
	}
	return fileGetter{files}, nil
}

// fileGetter has tar-split's name for Open.
type fileGetter struct{ *overlay2.Files }

// Get opens a file by its name in the layer's tar.
func (g fileGetter) Get(name string) (io.ReadCloser, error) { return g.Open(name) }
