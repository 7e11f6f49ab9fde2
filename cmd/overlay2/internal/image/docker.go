package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// dockerArchive is the file of docker save's first form, still beside the OCI one.
const dockerArchive = "manifest.json"

// saved is one image in manifest.json.
type saved struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// readSaved reads manifest.json.
func readSaved(set files) ([]saved, error) {
	raw, err := readSmall(set, dockerArchive, maxManifest)
	if err != nil {
		return nil, err
	}
	var list []saved
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("%w: manifest.json: %w", ErrInvalid, err)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%w: manifest.json lists no image", ErrInvalid)
	}
	return list, nil
}

// wanted returns those of list that have the name ref, and true; or all, if none has or there is no ref.
func wanted[T any](list []T, ref string, names func(T) []string) ([]T, bool) {
	if ref == "" {
		return list, false
	}
	found := slices.DeleteFunc(slices.Clone(list), func(e T) bool { return !slices.Contains(names(e), ref) })
	if len(found) == 0 {
		return list, false
	}
	return found, true
}

// dockerImages returns the images of a docker-save archive. It has no digests of the
// layers' bytes; the config's diff ids verify them.
func dockerImages(ctx context.Context, set files, ref string) ([]*Image, error) {
	list, err := readSaved(set)
	if err != nil {
		return nil, err
	}
	list, _ = wanted(list, ref, func(s saved) []string { return s.RepoTags })
	var images []*Image
	var known configs
	have := map[string]*Image{}
	for _, s := range list {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		key := strings.Join(append([]string{s.Config}, s.Layers...), "\x00")
		if img := have[key]; img != nil {
			img.Names = append(img.Names, s.RepoTags...)
			continue
		}
		if err := tooMany(len(images) + 1); err != nil {
			return nil, err
		}
		img, err := savedImage(ctx, set, s, &known)
		if err != nil {
			return nil, err
		}
		have[key] = img
		images = append(images, img)
	}
	return images, nil
}

// savedImage returns one image of manifest.json.
func savedImage(ctx context.Context, set files, s saved, known *configs) (*Image, error) {
	config, err := savedConfig(set, s.Config, known)
	if err != nil {
		return nil, err
	}
	layers := make([]Layer, 0, min(len(s.Layers), maxLayers))
	for _, name := range s.Layers {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		r, size, err := openNamed(set, name)
		if err != nil {
			return nil, err
		}
		if err := r.Close(); err != nil {
			return nil, err
		}
		open := func() (io.ReadCloser, error) {
			f, _, err := openNamed(set, name)
			return f, err
		}
		layers = append(layers, Layer{Size: size, open: open})
	}
	img, err := config.image(layers)
	if err != nil {
		return nil, err
	}
	img.Names = slices.Clone(s.RepoTags)
	return img, nil
}

// savedConfig reads the config of this name.
func savedConfig(set files, name string, known *configs) (*parsed, error) {
	return known.get(name, func() ([]byte, error) {
		config, err := readSmall(set, name, maxConfig)
		if err != nil {
			return nil, err
		}
		return config, checkConfigName(name, config)
	})
}

// isHex is the form of a SHA-256.
var isHex = regexp.MustCompile(`^[0-9a-f]{64}$`)

// checkConfigName verifies a config whose file is named by its digest: HEX.json of
// Docker before 25, blobs/sha256/HEX after, sha256:HEX of some builders.
func checkConfigName(name string, config []byte) error {
	hex := strings.TrimPrefix(strings.TrimSuffix(path.Base(name), ".json"), "sha256:")
	if !isHex.MatchString(hex) {
		return nil // a name that promises nothing
	}
	want := digest.NewDigestFromEncoded(digest.SHA256, hex)
	if got := digest.FromBytes(config); got != want {
		return fmt.Errorf("%w: the config is %s, not %s", ErrDigest, got, want)
	}
	return nil
}

// addSavedNames gives the images of an archive in both forms the full names that
// manifest.json has, where the index has only a tag.
func addSavedNames(ctx context.Context, set files, images []*Image) error {
	list, err := readSaved(set)
	if errors.Is(err, ErrMissing) {
		return nil // no second form
	}
	if err != nil {
		return err
	}
	byID := map[digest.Digest]*Image{}
	for _, img := range images {
		byID[img.ConfigDigest] = img
	}
	var known configs
	for _, s := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if len(s.RepoTags) == 0 {
			continue
		}
		config, err := savedConfig(set, s.Config, &known)
		if err != nil {
			return err
		}
		if err := tooMany(len(known.byName)); err != nil {
			return err
		}
		if img := byID[config.id]; img != nil {
			img.Names = s.RepoTags
		}
	}
	return nil
}
