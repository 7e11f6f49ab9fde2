package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// pack makes a tar of name, content pairs. A name that ends in / is a directory.
func pack(t testing.TB, pairs ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(pairs); i += 2 {
		h := &tar.Header{Name: pairs[i], Mode: 0o644, Size: int64(len(pairs[i+1])), Typeflag: tar.TypeReg}
		if pairs[i][len(pairs[i])-1] == '/' {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		must(t, w.WriteHeader(h))
		_, err := io.WriteString(w, pairs[i+1])
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func squeeze(t testing.TB, b []byte, how string) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	switch how {
	case CompressNone:
		return b
	case CompressGzip:
		w = gzip.NewWriter(&out)
	case CompressZstd:
		var err error
		w, err = zstd.NewWriter(&out)
		must(t, err)
	}
	_, err := w.Write(b)
	must(t, err)
	must(t, w.Close())
	return out.Bytes()
}

func asJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	must(t, err)
	return b
}

// fileset is an image source as names and contents; the tests break it before it is written.
type fileset map[string][]byte

func (s fileset) put(media string, b []byte) v1.Descriptor {
	d := v1.Descriptor{MediaType: media, Digest: digest.FromBytes(b), Size: int64(len(b))}
	s[blobName(d.Digest)] = b
	return d
}

// dir writes the set to a directory.
func (s fileset) dir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range s {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, b, 0o644))
	}
	return dir
}

// file writes the set to an archive, its names prefixed.
func (s fileset) file(t testing.TB, how, prefix string) string {
	t.Helper()
	var pairs []string
	for _, name := range slices.Sorted(maps.Keys(s)) {
		pairs = append(pairs, prefix+name, string(s[name]))
	}
	return write(t, squeeze(t, pack(t, pairs...), how))
}

func write(t testing.TB, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "source")
	must(t, os.WriteFile(path, b, 0o644))
	return path
}

// two is the pair of layers that most tests use.
func two(t testing.TB) [][]byte {
	return [][]byte{
		pack(t, "etc/", "", "etc/motd", "hello\n", "etc/old", "old"),
		pack(t, "etc/", "", "etc/.wh.old", "", "etc/new", "new"),
	}
}

func configOf(t testing.TB, layers [][]byte) []byte {
	t.Helper()
	c := v1.Image{Platform: v1.Platform{OS: "linux", Architecture: "amd64"}, RootFS: v1.RootFS{Type: "layers"}}
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromBytes(l))
	}
	return asJSON(t, c)
}

// built is an OCI layout in the making.
type built struct {
	set      fileset
	manifest v1.Manifest
	desc     v1.Descriptor
	index    v1.Index
}

// ociSet makes a layout of layers. edit, if set, may change the manifest before it is stored.
func ociSet(t testing.TB, how string, layers [][]byte, edit func(*built)) fileset {
	t.Helper()
	b := &built{set: fileset{}}
	media := map[string]string{CompressNone: v1.MediaTypeImageLayer, CompressGzip: v1.MediaTypeImageLayerGzip, CompressZstd: v1.MediaTypeImageLayerZstd}
	b.manifest.SchemaVersion = 2
	b.manifest.Config = b.set.put(v1.MediaTypeImageConfig, configOf(t, layers))
	for _, l := range layers {
		b.manifest.Layers = append(b.manifest.Layers, b.set.put(media[how], squeeze(t, l, how)))
	}
	if edit != nil {
		edit(b)
	}
	b.desc = b.set.put(v1.MediaTypeImageManifest, asJSON(t, b.manifest))
	b.index.SchemaVersion = 2
	b.index.Manifests = []v1.Descriptor{b.desc}
	b.index.Manifests[0].Annotations = map[string]string{v1.AnnotationRefName: "v1"}
	b.set["index.json"] = asJSON(t, b.index)
	b.set["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	return b.set
}

// dockerSet makes the first form of docker save.
func dockerSet(t testing.TB, how string, layers [][]byte) fileset {
	t.Helper()
	s := fileset{}
	config := configOf(t, layers)
	name := digest.FromBytes(config).Encoded() + ".json"
	s[name] = config
	m := saved{Config: name, RepoTags: []string{"demo/app:v1"}}
	for _, l := range layers {
		name := digest.FromBytes(append([]byte("id"), l...)).Encoded() + "/layer.tar"
		s[name] = squeeze(t, l, how)
		m.Layers = append(m.Layers, name)
	}
	s["manifest.json"] = asJSON(t, []saved{m})
	return s
}
