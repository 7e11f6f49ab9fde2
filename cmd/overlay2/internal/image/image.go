// Package image reads container images from files and directories and writes OCI
// layouts. It knows nothing of drivers or stores: an image is a config and a list of
// layers, and a layer is a stream that ends in io.EOF only when every digest was right.
package image

import (
	_ "crypto/sha256" // go-digest knows an algorithm only if it is linked
	_ "crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

var (
	// ErrInvalid says that a source is no image, or a part of it cannot be true.
	ErrInvalid = errors.New("invalid image")
	// ErrDigest says that bytes are not those the digest or size promised.
	ErrDigest = errors.New("digest mismatch")
	// ErrMissing says that the source lacks a file that it refers to.
	ErrMissing = errors.New("missing from the image")
	// ErrUnsupported says that a media type or a compression is none that can be read.
	ErrUnsupported = errors.New("unsupported")
	// ErrPlatform says that the source has no image for the platform that was asked for.
	ErrPlatform = errors.New("no image for the platform")
)

// The limits of what is read into memory. Registries refuse manifests over 4 MiB.
const (
	maxManifest = 4 << 20
	maxConfig   = 8 << 20
	maxLayers   = 1024
	// Of one source, which may be one that somebody made to cost much:
	maxImages  = 1024
	maxConfigs = 64 << 20 // the configs together
)

// Kinds of sources.
const (
	KindOCI    = "oci"
	KindDocker = "docker"
	KindRootfs = "rootfs"
)

// Image is one image of a source.
type Image struct {
	// Names are the references that the source gives, none for a bare layout.
	Names []string
	// Config is the image config, byte for byte.
	Config []byte
	// ConfigDigest is the digest of Config: the image's id.
	ConfigDigest digest.Digest
	// Layers are the layers, base first.
	Layers []Layer
}

// Layer is one layer of an image.
type Layer struct {
	// DiffID is the digest of the plain tar, as the config promises it.
	DiffID digest.Digest
	// ChainID names this layer on top of those below it (image-spec, config.md).
	ChainID digest.Digest
	// Blob is the digest of the stored bytes, empty where the source has none (docker save).
	Blob digest.Digest
	// Size is the length of the stored bytes, -1 if unknown.
	Size int64

	open func() (io.ReadCloser, error)
	// plain says that the bytes are a tar, whatever its first name looks like.
	plain bool
}

// TarLayer returns a layer of a plain tar with the digest diffID.
func TarLayer(diffID digest.Digest, open func() (io.ReadCloser, error)) Layer {
	return Layer{DiffID: diffID, Size: -1, open: open, plain: true}
}

// Source is an opened image source. Close it after the last layer was read.
type Source struct {
	// Kind is KindOCI, KindDocker or KindRootfs.
	Kind string
	// Images are the images for the platform, at least one.
	Images []*Image

	closers []io.Closer
}

// Close releases the files of the source.
func (s *Source) Close() error {
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i].Close())
	}
	s.closers = nil
	return errors.Join(errs...)
}

// ChainIDs returns the chain id of each layer: the first diff id, then the digest of
// "parent diffid" (image-spec v1.1, config.md, "Layer ChainID").
func ChainIDs(diffIDs []digest.Digest) []digest.Digest {
	chain := make([]digest.Digest, len(diffIDs))
	for i, id := range diffIDs {
		if i == 0 {
			chain[i] = id
			continue
		}
		chain[i] = ChainID(chain[i-1], id)
	}
	return chain
}

// ChainID returns the chain id of a layer with diffID over the chain parent, which is
// empty for a base layer.
func ChainID(parent, diffID digest.Digest) digest.Digest {
	if parent == "" {
		return diffID
	}
	return digest.SHA256.FromString(parent.String() + " " + diffID.String())
}

// checkConfig decodes config and checks that its root filesystem is a list of layers
// with digests.
func checkConfig(config []byte) (*v1.Image, error) {
	var c v1.Image
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("%w: config: %w", ErrInvalid, err)
	}
	if c.RootFS.Type != "layers" {
		return nil, fmt.Errorf("%w: config: rootfs type is %q, not \"layers\"", ErrInvalid, c.RootFS.Type)
	}
	if len(c.RootFS.DiffIDs) > maxLayers {
		return nil, fmt.Errorf("%w: config: %d layers, more than %d", ErrInvalid, len(c.RootFS.DiffIDs), maxLayers)
	}
	for i, id := range c.RootFS.DiffIDs {
		// The layers' names on disk are made of these: anything but sha256 is refused here.
		if err := id.Validate(); err != nil || id.Algorithm() != digest.SHA256 {
			return nil, fmt.Errorf("%w: config: diff id %d, %q, is no sha256 digest", ErrInvalid, i, id)
		}
	}
	return &c, nil
}

// newImage joins a config with the layers' openers. len(layers) is checked against the config.
func newImage(config []byte, layers []Layer) (*Image, error) {
	c, err := parseConfig(config)
	if err != nil {
		return nil, err
	}
	return c.image(layers)
}

// parsed is a config that has been checked.
type parsed struct {
	raw      []byte
	id       digest.Digest
	diffIDs  []digest.Digest
	chainIDs []digest.Digest
}

func parseConfig(config []byte) (*parsed, error) {
	c, err := checkConfig(config)
	if err != nil {
		return nil, err
	}
	return &parsed{config, digest.FromBytes(config), c.RootFS.DiffIDs, ChainIDs(c.RootFS.DiffIDs)}, nil
}

func (c *parsed) image(layers []Layer) (*Image, error) {
	if len(c.diffIDs) != len(layers) {
		return nil, fmt.Errorf("%w: config has %d diff ids, manifest %d layers", ErrInvalid, len(c.diffIDs), len(layers))
	}
	for i, chain := range c.chainIDs {
		layers[i].DiffID, layers[i].ChainID = c.diffIDs[i], chain
	}
	return &Image{Config: c.raw, ConfigDigest: c.id, Layers: layers}, nil
}
