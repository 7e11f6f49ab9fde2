//go:build linux

package overlay2

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/bcc2decd/overlay2/quota"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// driverName is what Docker calls this driver.
const driverName = "overlay2"

// Driver keeps the layers of one home directory. All its methods may be called at the
// same time. Two Drivers share nothing but what is on disk.
type Driver struct {
	// Immutable after New.
	home             string // absolute, without symlinks
	opts             Options
	facts            facts
	mountOptions     []string
	maxDepth         int // lower layers that a mount can have
	format           archive.Format
	rootUID, rootGID uint32
	log              *logrus.Entry
	quota            *quota.Control
	quotaErr         error // why quota is nil
	maxHoles         int64 // of a layer whose digests an apply records

	instance string // of the filesystem that home lies on, as it is mounted now

	mappedOnce sync.Once
	mapped     mappedBy // see mapping. Both protected by mappedOnce.
	mappedErr  error

	layers   layerTable
	known    knownLinks
	kept     keptLayers
	volatile volatileLayers
	trash    trash
	sizes    sync.Map // of final layers, by link: see layerSize
	syncer   syncer
	bind     homeBind
}

// New opens the home directory, makes it if it is not there, finds out what the kernel
// and the filesystem can do, and mends what a crash left behind.
//
// A kernel or filesystem that cannot do it is ErrNotSupported or ErrIncompatibleFS.
// Call Cleanup when the Driver is no longer used.
func New(home string, opts Options) (*Driver, error) {
	d, err := newDriver(home, opts)
	if err != nil {
		return nil, fmt.Errorf("new %s: %w", home, err)
	}
	return d, nil
}

// Init is New with options in a daemon's form; see ParseOptions.
func Init(home string, options []string, idMap archive.IDMap) (*Driver, error) {
	opts, err := ParseOptions(options)
	if err != nil {
		return nil, err
	}
	opts.IDMap = idMap
	return New(home, opts)
}

func newDriver(home string, opts Options) (*Driver, error) {
	d := &Driver{opts: opts, log: opts.Log, maxHoles: applyHoles}
	d.opts.MountOptions = slices.Clone(opts.MountOptions)
	if d.log == nil {
		d.log = logrus.NewEntry(logrus.StandardLogger())
	}
	if err := checkMountOptions(opts.MountOptions); err != nil {
		return nil, err
	}
	if opts.MountMethod > MountFiles {
		return nil, fmt.Errorf("%w: mount method %v", ErrInvalidOption, opts.MountMethod)
	}
	if opts.Durability > DurabilityOff {
		return nil, fmt.Errorf("%w: durability %v", ErrInvalidOption, opts.Durability)
	}
	if err := opts.IDMap.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidOption, err)
	}
	var err error
	if d.rootUID, d.rootGID, err = opts.IDMap.Root(); err != nil {
		return nil, fmt.Errorf("%w: id map without root: %w", ErrInvalidOption, err)
	}
	if home == "" {
		return nil, fmt.Errorf("%w: home is empty", ErrInvalidOption)
	}
	made, err := d.makeHome(home)
	if err == nil {
		err = d.openHome()
	}
	if err != nil {
		return nil, errors.Join(err, unmakeHome(made))
	}
	return d, nil
}

// makeHome makes the home and what lies in it, sets d.home, and returns the paths it
// has made, for undoing.
func (d *Driver) makeHome(home string) (made []string, err error) {
	if home, err = filepath.Abs(home); err != nil {
		return nil, err
	}
	for dir := home; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Lstat(dir); err == nil {
			break
		}
		made = append(made, dir)
	}
	if err := os.MkdirAll(filepath.Dir(home), 0o755); err != nil {
		return made, err
	}
	if err := os.Mkdir(home, 0o710); err != nil && !errors.Is(err, fs.ErrExist) {
		return made, err
	}
	if d.home, err = filepath.EvalSymlinks(home); err != nil {
		return made, err
	}
	fd, err := sys.OpenRoot(d.home)
	if err != nil {
		return made, &fs.PathError{Op: "open", Path: d.home, Err: err}
	}
	defer func() { err = errors.Join(err, sys.Close(fd)) }()
	if len(made) > 0 {
		if err := errors.Join(unix.Fchmod(fd, 0o710), unix.Fchown(fd, -1, int(d.rootGID))); err != nil {
			return made, &fs.PathError{Op: "chmod", Path: d.home, Err: err}
		}
	}
	for _, name := range []string{linkDir, stagingDir} {
		switch err := sys.Mkdirat(fd, name, 0o700); {
		case err == nil:
			made = append([]string{filepath.Join(d.home, name)}, made...)
		case !errors.Is(err, fs.ErrExist):
			return made, &fs.PathError{Op: "mkdir", Path: filepath.Join(d.home, name), Err: err}
		}
		if err := sys.IsDirat(fd, name); err != nil {
			return made, corrupt("%s: %w", filepath.Join(d.home, name), err)
		}
	}
	return made, nil
}

// unmakeHome removes what makeHome has made, deepest first, as far as it is empty.
func unmakeHome(made []string) error {
	for _, dir := range made {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// openHome probes, makes mounts private where they are not, and finishes what a crash interrupted.
func (d *Driver) openHome() (err error) {
	// Locked, so that the recovery of another process does not take what is tried for a leftover.
	s, err := d.openStaging()
	if err != nil {
		return err
	}
	d.facts, err = d.probeHome()
	s.close()
	if err != nil {
		return err
	}
	d.known.maxHeld = descriptorsFor(heldFDs, heldDirsPart, maxHeldDirs)
	d.kept.max = descriptorsFor(keptFDs, keptLayersPart, maxKeptLayers)
	if !d.facts.fineTimes {
		d.known.settle = settleTime
	}
	if err := d.facts.checkMethod(d.opts.MountMethod); err != nil {
		return err
	}
	d.maxDepth = d.facts.maxDepth(d.opts.MountMethod)
	d.mountOptions = append(d.facts.mountOptions(), d.opts.MountOptions...)
	if d.facts.userxattr {
		d.format = archive.OverlayUser
	}
	if err := d.openQuota(); err != nil {
		return err
	}
	if err := d.makePrivate(); err != nil {
		return err
	}
	if err := d.recoverHome(); err != nil {
		return errors.Join(err, d.Cleanup())
	}
	return nil
}

// String returns "overlay2".
func (d *Driver) String() string { return driverName }

// Status returns what docker info shows of the driver, and our own facts after it.
func (d *Driver) Status() [][2]string {
	return [][2]string{
		{"Backing Filesystem", d.facts.backingFS},
		{"Supports d_type", d.facts.dType.String()},
		{"Using metacopy", d.facts.metacopy.String()},
		{"Native Overlay Diff", strconv.FormatBool(d.facts.nativeDiff())},
		{"userxattr", strconv.FormatBool(d.facts.userxattr)},
		{"Project Quota", strconv.FormatBool(d.hasQuota())},
		{"Mount Method", d.opts.MountMethod.String()},
		{"Max Depth", strconv.Itoa(d.maxDepth)},
		{"ID-mapped Mounts", d.mappingStatus()},
		{"Mount Options", strings.Join(d.mountOptions, ",")},
		{"Durability", d.opts.Durability.String()},
	}
}

// GetMetadata returns the host paths of a layer's directories: UpperDir, WorkDir and
// MergedDir, and for a layer with a parent LowerDir, the diff directories of the
// ancestors, nearest first, joined by ":". The layer need not be mounted.
func (d *Driver) GetMetadata(id string) (map[string]string, error) {
	m, err := d.metadata(id)
	return m, layerErr("metadata", id, err)
}

func (d *Driver) metadata(id string) (map[string]string, error) {
	l, err := openLayer(d.home, id)
	if err != nil {
		return nil, err
	}
	defer l.close()
	lowers, err := d.lowerPaths(l)
	if err != nil {
		return nil, err
	}
	m := map[string]string{
		"UpperDir":  l.path(diffName),
		"WorkDir":   l.path(workName),
		"MergedDir": l.path(mergedName),
	}
	if len(lowers) > 0 {
		m["LowerDir"] = strings.Join(lowers, ":")
	}
	return m, nil
}

// lowerPaths returns the diff directories of the layer's ancestors, nearest first.
func (d *Driver) lowerPaths(l *layer) ([]string, error) {
	ids, err := d.ancestors(l)
	if err != nil {
		return nil, err
	}
	return diffPaths(d.home, ids), nil
}

// ancestors returns the IDs of the layer's ancestors, nearest first.
func (d *Driver) ancestors(l *layer) ([]string, error) {
	links, err := l.lowers()
	if err != nil {
		return nil, err
	}
	return d.resolve(links)
}

// Exists reports whether there is a layer with this ID.
func (d *Driver) Exists(id string) bool {
	if checkID(id) != nil {
		return false
	}
	st, err := os.Lstat(filepath.Join(d.home, id))
	return err == nil && st.IsDir()
}

// Cleanup syncs what waits for that, waits for deletions in the background and undoes what
// New has mounted, or the New of a process that is no more, unless layers are mounted or another Driver uses the home. Mounted
// layers stay mounted: their Puts may come from another process. The Driver can be used on.
func (d *Driver) Cleanup() error {
	err := d.flush(true)
	if err != nil {
		err = fmt.Errorf("cleanup %s: %w", d.home, err)
	}
	d.trash.add(d) // what could not be deleted
	d.trash.wait()
	d.handOver()
	d.dropAllKept()
	d.known.forgetAll()
	return errors.Join(err, d.unbindHome())
}

// chownRoot gives name beneath dirfd to the remapped root.
func (d *Driver) chownRoot(dirfd int, name string) error {
	if d.rootUID == 0 && d.rootGID == 0 {
		return nil
	}
	return unix.Fchownat(dirfd, name, int(d.rootUID), int(d.rootGID), unix.AT_SYMLINK_NOFOLLOW)
}
