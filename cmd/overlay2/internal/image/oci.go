package image

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's names for what OCI has taken over.
const (
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
	dockerForeign  = "application/vnd.docker.image.rootfs.foreign.diff.tar"
	ociForeign     = "application/vnd.oci.image.layer.nondistributable.v1.tar"
	// containerdName is where containerd and Docker keep the full reference.
	containerdName = "io.containerd.image.name"
	// attestation marks what buildkit puts beside an image and is none.
	attestation = "vnd.docker.reference.type"
)

// maxIndexDepth bounds how deep indexes may lie in indexes.
const maxIndexDepth = 4

// layout reads an OCI image layout.
type layout struct {
	ctx      context.Context //nolint:containedctx // of the reading of the layout, which ends before Open does
	set      files
	platform Platform
	configs  *configs
}

// images returns the layout's images for the platform, one for each descriptor of its index. If some have the name ref it is
// only these, and named is true.
func (l layout) images(ref string) (images []*Image, named bool, err error) {
	raw, err := readSmall(l.set, v1.ImageLayoutFile, maxManifest)
	if err != nil {
		return nil, false, err
	}
	var marker v1.ImageLayout
	if err := json.Unmarshal(raw, &marker); err != nil {
		return nil, false, fmt.Errorf("%w: oci-layout: %w", ErrInvalid, err)
	}
	if !strings.HasPrefix(marker.Version, "1.") {
		return nil, false, fmt.Errorf("%w: oci-layout: version %q", ErrUnsupported, marker.Version)
	}
	if raw, err = readSmall(l.set, v1.ImageIndexFile, maxManifest); err != nil {
		return nil, false, err
	}
	var index v1.Index
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, false, fmt.Errorf("%w: index.json: %w", ErrInvalid, err)
	}
	picked, err := l.pick(index.Manifests)
	if err != nil {
		return nil, false, err
	}
	picked, named = wanted(picked, ref, names)
	byID, byManifest := map[digest.Digest]*Image{}, map[digest.Digest]*Image{}
	for _, d := range picked {
		img := byManifest[d.Digest]
		if img == nil {
			if err := tooMany(len(byManifest) + 1); err != nil {
				return nil, false, err
			}
			if img, err = l.image(d, 0); err != nil {
				return nil, false, err
			}
			byManifest[d.Digest] = img
		}
		// The same image under a second name is one image.
		if have := byID[img.ConfigDigest]; have != nil {
			have.Names = append(have.Names, names(d)...)
			continue
		}
		img.Names = names(d)
		byID[img.ConfigDigest] = img
		images = append(images, img)
	}
	return images, named, nil
}

// names returns the references in a descriptor's annotations, the fullest first.
func names(d v1.Descriptor) []string {
	if n := d.Annotations[containerdName]; n != "" {
		return []string{n}
	}
	if n := d.Annotations[v1.AnnotationRefName]; n != "" {
		return []string{n}
	}
	return nil
}

// pick leaves out what is no image, and what is for other platforms.
func (l layout) pick(manifests []v1.Descriptor) ([]v1.Descriptor, error) {
	var picked []v1.Descriptor
	var others []string
	for _, d := range manifests {
		if d.Annotations[attestation] != "" || d.ArtifactType != "" {
			continue
		}
		if d.Platform != nil && !l.platform.matches(d.Platform) {
			others = append(others, Platform{d.Platform.OS, d.Platform.Architecture, d.Platform.Variant}.String())
			continue
		}
		picked = append(picked, d)
	}
	switch {
	case len(picked) > 0:
		return picked, nil
	case len(others) > 0:
		return nil, fmt.Errorf("%w %s: there is %s", ErrPlatform, l.platform, strings.Join(others, ", "))
	}
	return nil, fmt.Errorf("%w: the index lists no image", ErrInvalid)
}

// image follows a descriptor through indexes to one image.
func (l layout) image(d v1.Descriptor, depth int) (*Image, error) {
	if err := l.ctx.Err(); err != nil {
		return nil, err
	}
	switch d.MediaType {
	case v1.MediaTypeImageIndex, dockerList:
		if depth == maxIndexDepth {
			return nil, fmt.Errorf("%w: more than %d indexes in each other", ErrInvalid, maxIndexDepth)
		}
		raw, err := l.blob(d, maxManifest)
		if err != nil {
			return nil, err
		}
		var index v1.Index
		if err := json.Unmarshal(raw, &index); err != nil {
			return nil, fmt.Errorf("%w: index %s: %w", ErrInvalid, d.Digest, err)
		}
		picked, err := l.pick(index.Manifests)
		if err != nil {
			return nil, err
		}
		return l.image(picked[0], depth+1)
	case v1.MediaTypeImageManifest, dockerManifest:
		return l.manifest(d)
	}
	return nil, fmt.Errorf("%w: manifest %s has media type %q", ErrUnsupported, d.Digest, d.MediaType)
}

// manifest reads an image manifest and its config.
func (l layout) manifest(d v1.Descriptor) (*Image, error) {
	raw, err := l.blob(d, maxManifest)
	if err != nil {
		return nil, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("%w: manifest %s: %w", ErrInvalid, d.Digest, err)
	}
	switch m.Config.MediaType {
	case v1.MediaTypeImageConfig, dockerConfig:
	default:
		return nil, fmt.Errorf("%w: config of manifest %s has media type %q", ErrUnsupported, d.Digest, m.Config.MediaType)
	}
	// The size is part of what is verified.
	config, err := l.configs.get(fmt.Sprintf("%s %d", m.Config.Digest, m.Config.Size), func() ([]byte, error) { return l.blob(m.Config, maxConfig) })
	if err != nil {
		return nil, err
	}
	layers := make([]Layer, 0, min(len(m.Layers), maxLayers))
	for _, ld := range m.Layers {
		if err := l.ctx.Err(); err != nil {
			return nil, err
		}
		layer, err := l.layer(ld)
		if err != nil {
			return nil, err
		}
		layers = append(layers, layer)
	}
	return config.image(layers)
}

// layer checks a layer's descriptor and that its blob is there.
func (l layout) layer(d v1.Descriptor) (Layer, error) {
	base := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(d.MediaType, "+gzip"), "+zstd"), ".gzip")
	switch strings.TrimSuffix(base, ".zstd") {
	case v1.MediaTypeImageLayer, ociForeign, dockerLayer, dockerForeign:
	default:
		return Layer{}, fmt.Errorf("%w: layer %s has media type %q", ErrUnsupported, d.Digest, d.MediaType)
	}
	r, err := l.openBlob(d)
	if err != nil {
		return Layer{}, err
	}
	open := func() (io.ReadCloser, error) { return l.openBlob(d) }
	return Layer{Blob: d.Digest, Size: d.Size, open: open}, r.Close()
}

// openBlob opens a blob and compares its length with the descriptor's.
func (l layout) openBlob(d v1.Descriptor) (io.ReadCloser, error) {
	// Only a valid digest makes a file name: "sha256:../../x" ends here.
	if err := d.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%w: digest %q: %w", ErrInvalid, d.Digest, err)
	}
	r, size, err := openNamed(l.set, blobName(d.Digest))
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", d.Digest, err)
	}
	if size != d.Size {
		if cerr := r.Close(); cerr != nil {
			return nil, cerr
		}
		return nil, fmt.Errorf("blob %s: %w: it has %d bytes, not %d", d.Digest, ErrDigest, size, d.Size)
	}
	return r, nil
}

// blob reads a small blob and verifies it.
func (l layout) blob(d v1.Descriptor, limit int64) ([]byte, error) {
	r, err := l.openBlob(d)
	if err != nil {
		return nil, err
	}
	if err := r.Close(); err != nil {
		return nil, err
	}
	b, err := readSmall(l.set, blobName(d.Digest), limit)
	if err != nil {
		return nil, err
	}
	if got := d.Digest.Algorithm().FromBytes(b); got != d.Digest {
		return nil, fmt.Errorf("%w: the blob is %s, not %s", ErrDigest, got, d.Digest)
	}
	return b, nil
}
