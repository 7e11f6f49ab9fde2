// Package store keeps what the tool knows beside the driver: the images' names and
// configs, and where each layer comes from. It is a directory of small JSON files, each
// written under a temporary name and renamed.
//
//	ROOT/overlay2/           the driver's home
//	ROOT/images/NAME.json    an Image, the name escaped
//	ROOT/layers/ID.json      a Layer
//	ROOT/layers/ID.split.gz  how to make the very bytes of the layer's tar again (tar-split)
//	ROOT/tmp/                archives laid out for random access, files without names; locked directories
//	ROOT/lock                locked by a command that changes the set of layers or images
package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

var (
	// ErrNotFound says that nothing has the name.
	ErrNotFound = errors.New("not found")
	// ErrExists says that the name is taken.
	ErrExists = errors.New("exists already")
	// ErrInUse says that something else needs it.
	ErrInUse = errors.New("is in use")
	// ErrName says that a name cannot be one.
	ErrName = errors.New("invalid name")
	// ErrRecord says that a file of the store holds what the tool never writes.
	ErrRecord = errors.New("damaged record")
)

// Image is a named image.
type Image struct {
	Name string `json:"name"`
	// ID is the digest of Config.
	ID digest.Digest `json:"id"`
	// Config is the config's bytes.
	Config Config `json:"config"`
	// Layers are the layers' ids, base first.
	Layers []string `json:"layers"`
	// Imported is when the name was given.
	Imported time.Time `json:"imported"`
}

// Kinds of layers.
const (
	KindImage     = "image"
	KindContainer = "container"
)

// Layer is what is known of a layer beside the driver.
type Layer struct {
	ID     string `json:"id"`
	Parent string `json:"parent,omitempty"`
	// Kind is KindImage for a layer with a digest, KindContainer for one to write in.
	Kind string `json:"kind"`
	// DiffID is the digest of the layer's tar, of image layers only.
	DiffID digest.Digest `json:"diffID,omitempty"`
	// TarSize is the length of that tar, Size the bytes of the content on disk.
	TarSize int64 `json:"tarSize,omitempty"`
	Size    int64 `json:"size,omitempty"`
	// Pending says that the layer is being made; left by a crash, it is no layer.
	Pending bool      `json:"pending,omitempty"`
	Created time.Time `json:"created"`
	// Image and Config are those of the image a container was made from.
	Image  string `json:"image,omitempty"`
	Config Config `json:"config,omitempty"`
	// Binds are the paths a container is bound to, beside the driver's mount.
	Binds []string `json:"binds,omitempty"`
}

// Store is an open root directory.
type Store struct{ root string }

// Directories below the root.
const (
	homeDir  = "overlay2"
	imageDir = "images"
	layerDir = "layers"
	tempDir  = "tmp"
	lockFile = "lock"
)

// Open returns the store at root, which need not be there. Nothing is made.
func Open(root string) (*Store, error) {
	if root == "" {
		return nil, fmt.Errorf("%w: root is empty", ErrName)
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	return &Store{root}, nil
}

// Home is the driver's home.
func (s *Store) Home() string { return filepath.Join(s.root, homeDir) }

// Temp is the directory for temporary files.
func (s *Store) Temp() string { return filepath.Join(s.root, tempDir) }

// Exists reports whether the store has been made.
func (s *Store) Exists() bool {
	_, err := os.Stat(filepath.Join(s.root, layerDir))
	return err == nil
}

// Init makes the directories that are not there.
func (s *Store) Init() error {
	// Container layers hold setuid files: nobody else is to reach them.
	if err := os.MkdirAll(s.root, 0o711); err != nil {
		return err
	}
	for _, d := range []string{imageDir, layerDir, tempDir} {
		if err := os.Mkdir(filepath.Join(s.root, d), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// The forms of names. A container's name is the driver's layer id.
var (
	imageName     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}$`)
	containerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,126}$`)
	fullID        = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// CheckImageName refuses what cannot name an image.
func CheckImageName(name string) error {
	if !imageName.MatchString(name) {
		return fmt.Errorf("%w for an image: %q (letters, digits and ._:/@+-, at most 200)", ErrName, name)
	}
	return nil
}

// CheckContainerName refuses what cannot name a container. 64 hex digits are for image layers.
func CheckContainerName(name string) error {
	if !containerName.MatchString(name) || fullID.MatchString(name) {
		return fmt.Errorf("%w for a layer: %q (letters, digits and _.-, at most 127)", ErrName, name)
	}
	return nil
}

func (s *Store) imagePath(name string) string {
	return filepath.Join(s.root, imageDir, url.PathEscape(name)+".json")
}

func (s *Store) layerPath(id string) string {
	return filepath.Join(s.root, layerDir, id+".json")
}

// SplitPath is where a layer's tar-split is kept.
func (s *Store) SplitPath(id string) string {
	return filepath.Join(s.root, layerDir, id+".split.gz")
}

// Image returns the image of this name.
func (s *Store) Image(name string) (*Image, error) {
	if err := CheckImageName(name); err != nil {
		return nil, fmt.Errorf("image %q %w", name, ErrNotFound)
	}
	img, err := s.readImage(name)
	if err != nil {
		return nil, err
	}
	return img, nil
}

// readImage returns what the record says besides an ErrRecord, too, as far as it can be read.
func (s *Store) readImage(name string) (*Image, error) {
	var img Image
	if err := s.read(s.imagePath(name), &img); err != nil {
		return &Image{}, notFound("image", name, err)
	}
	for _, id := range img.Layers {
		if !fullID.MatchString(id) {
			return &Image{}, fmt.Errorf("%w: %s: layer %q", ErrRecord, s.imagePath(name), id)
		}
	}
	if img.Name != name || digest.FromString(string(img.Config)) != img.ID {
		return &img, fmt.Errorf("%w: %s", ErrRecord, s.imagePath(name))
	}
	return &img, nil
}

// Damaged is an image whose record is damaged.
type Damaged struct {
	Name string
	// Layers are those that it needs, nil if the record does not tell.
	Layers []string
	Err    error
}

// Images returns all images by name, and those with a damaged record apart.
func (s *Store) Images() (all []*Image, damaged []Damaged, err error) {
	names, err := s.list(imageDir)
	if err != nil {
		return nil, nil, err
	}
	for _, n := range names {
		name, err := url.PathUnescape(n)
		if err != nil || CheckImageName(name) != nil || url.PathEscape(name) != n {
			damaged = append(damaged, Damaged{n, []string{}, fmt.Errorf("%w: %s: no image has this name", ErrRecord, n)})
			continue
		}
		switch img, err := s.readImage(name); {
		case errors.Is(err, ErrNotFound): // removed since
		case errors.Is(err, ErrRecord):
			damaged = append(damaged, Damaged{name, img.Layers, err})
		case err != nil:
			return nil, nil, err
		default:
			all = append(all, img)
		}
	}
	return all, damaged, nil
}

// PutImage writes an image, in the place of one of the same name.
func (s *Store) PutImage(img *Image) error {
	if err := CheckImageName(img.Name); err != nil {
		return err
	}
	return s.write(s.imagePath(img.Name), img, true)
}

// DeleteImage removes an image's record.
func (s *Store) DeleteImage(name string) error {
	if err := CheckImageName(name); err != nil {
		return err
	}
	return s.remove(s.imagePath(name))
}

// Layer returns the layer with this id.
func (s *Store) Layer(id string) (*Layer, error) {
	if !containerName.MatchString(id) {
		return nil, fmt.Errorf("layer %q %w", id, ErrNotFound)
	}
	var l Layer
	switch err := s.read(s.layerPath(id), &l); {
	case errors.Is(err, errEmpty): // see StageLayer
		l = Layer{ID: id, Kind: KindContainer, Pending: true}
		if fullID.MatchString(id) {
			l.Kind = KindImage
		}
	case err != nil:
		return nil, notFound("layer", id, err)
	}
	if l.ID != id || (l.Parent != "" && !containerName.MatchString(l.Parent)) || (l.Kind == KindImage) != fullID.MatchString(id) {
		return nil, fmt.Errorf("%w: %s", ErrRecord, s.layerPath(id))
	}
	return &l, nil
}

// Layers returns all layers by id.
func (s *Store) Layers() ([]*Layer, error) {
	ids, err := s.list(layerDir)
	if err != nil {
		return nil, err
	}
	var all []*Layer
	for _, id := range ids {
		l, err := s.Layer(id)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	return all, nil
}

// PutLayer writes a layer's record, in the place of an older one.
func (s *Store) PutLayer(l *Layer) error { return s.write(s.layerPath(l.ID), l, true) }

// StageLayer is PutLayer without waiting for the disk. If the power fails before Sync the record
// may be gone, or empty: then the layer counts as never finished.
func (s *Store) StageLayer(l *Layer) error { return s.write(s.layerPath(l.ID), l, false) }

// DeleteLayers removes the records of layers.
func (s *Store) DeleteLayers(ids ...string) error {
	var errs []error
	for _, id := range ids {
		errs = append(errs, ignoreAbsent(os.Remove(s.SplitPath(id))), ignoreAbsent(os.Remove(s.layerPath(id))))
	}
	return errors.Join(append(errs, syncDir(filepath.Join(s.root, layerDir)))...)
}

// Chain returns the layer id and its ancestors, nearest first.
func (s *Store) Chain(id string) ([]*Layer, error) {
	var chain []*Layer
	for id != "" {
		l, err := s.Layer(id)
		if err != nil {
			return nil, err
		}
		if chain = append(chain, l); len(chain) > 1024 {
			return nil, fmt.Errorf("%w: %s: its parents go round in a circle", ErrRecord, s.layerPath(id))
		}
		id = l.Parent
	}
	return chain, nil
}

// Find returns the layer that ref names: an id, or the beginning of one, at least four
// characters of it and no other's.
func (s *Store) Find(ref string) (*Layer, error) {
	l, err := s.Layer(ref)
	if !errors.Is(err, ErrNotFound) || len(ref) < 4 {
		return l, err
	}
	ids, lerr := s.list(layerDir)
	if lerr != nil {
		return nil, lerr
	}
	var found []string
	for _, id := range ids {
		if strings.HasPrefix(id, ref) && fullID.MatchString(id) {
			found = append(found, id)
		}
	}
	switch len(found) {
	case 0:
		return nil, err
	case 1:
		return s.Layer(found[0])
	}
	return nil, fmt.Errorf("%w: %d layers begin with %q", ErrName, len(found), ref)
}

// list returns the names of the records of a directory, without ".json".
func (s *Store) list(dir string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.root, dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".json"); ok && !strings.HasPrefix(name, ".") {
			names = append(names, name)
		}
	}
	return names, nil
}

func (s *Store) read(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if len(b) == 0 {
		return fmt.Errorf("%w: %s: %w", ErrRecord, path, errEmpty)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrRecord, path, err)
	}
	return nil
}

// errEmpty says that a record has no content: the power failed before it was on the disk.
var errEmpty = errors.New("it is empty")

func notFound(what, name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s %q %w", what, name, ErrNotFound)
	}
	return err
}
