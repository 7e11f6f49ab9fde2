package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// bigConfig is a config of nearly the greatest length, of an image without layers.
func bigConfig(n int) []byte {
	return fmt.Appendf(nil, `{"os":"linux","architecture":"amd64","author":"%d%s","rootfs":{"type":"layers","diff_ids":[]}}`, n, strings.Repeat("a", maxConfig-300))
}

// opened opens a source and returns by how many bytes the heap has grown.
func opened(t *testing.T, path string) (*Source, int64, error) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	s, err := open(t, path, Options{})
	runtime.GC()
	runtime.ReadMemStats(&after)
	return s, int64(after.HeapAlloc) - int64(before.HeapAlloc), err
}

// Many images of one config hold it once; many configs are an error.
func TestManyConfigs(t *testing.T) {
	config := bigConfig(0)
	docker := func(n int, config func(i int) string) string {
		entries := make([]string, n)
		for i := range entries {
			entries[i] = fmt.Sprintf(`{"Config":%q,"RepoTags":["a:%d"],"Layers":[]}`, config(i), i)
		}
		return "[" + strings.Join(entries, ",") + "]"
	}
	index := func(set fileset, n int, config func(i int) []byte) {
		var index v1.Index
		for i := range n {
			m := v1.Manifest{Config: set.put(v1.MediaTypeImageConfig, config(i))}
			m.Annotations = map[string]string{"n": fmt.Sprint(i)}
			d := set.put(v1.MediaTypeImageManifest, asJSON(t, m))
			index.Manifests = append(index.Manifests, d, d)
		}
		set["index.json"] = asJSON(t, index)
		set["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	}
	one := fileset{"c": config, "manifest.json": []byte(docker(60, func(int) string { return "c" }))}
	oneOCI, many, manyOCI := fileset{}, fileset{}, fileset{}
	index(oneOCI, 10, func(int) []byte { return config })
	index(manyOCI, 9, bigConfig)
	for i := range 9 {
		many[fmt.Sprint(i)] = bigConfig(i)
	}
	many["manifest.json"] = []byte(docker(9, func(i int) string { return fmt.Sprint(i) }))
	for name, c := range map[string]struct {
		set  fileset
		want int
		err  error
	}{
		"docker, one": {one, 1, nil}, "oci, one": {oneOCI, 1, nil},
		"docker, many": {many, 0, ErrInvalid}, "oci, many": {manyOCI, 0, ErrInvalid},
	} {
		s, grown, err := opened(t, c.set.dir(t))
		if !errors.Is(err, c.err) || err == nil && len(s.Images) != c.want || grown > 20<<20 {
			t.Errorf("%s: %v, %d MiB", name, err, grown>>20)
		}
	}
	if s, err := open(t, one.dir(t), Options{}); err != nil || len(s.Images[0].Names) != 60 {
		t.Errorf("%v: names are lost", err)
	}
}

// The number of images is bounded, that of names for one is not.
func TestManyImages(t *testing.T) {
	set := fileset{"c": configOf(t, [][]byte{nil})}
	var list []saved
	for i := range maxImages + 1 {
		name := fmt.Sprintf("l%d", i)
		set[name] = nil
		list = append(list, saved{Config: "c", Layers: []string{name}})
	}
	set["manifest.json"] = asJSON(t, list)
	if _, err := open(t, set.file(t, CompressNone, ""), Options{}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "images") {
		t.Error(err)
	}
	set["manifest.json"] = asJSON(t, list[1:])
	if _, err := open(t, set.file(t, CompressNone, ""), Options{}); err != nil {
		t.Error(err)
	}
}

// Names of archives that no image needs take no memory.
func TestLongNames(t *testing.T) {
	archive := func(n, length int) string {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for i := range n {
			must(t, w.WriteHeader(&tar.Header{Name: fmt.Sprintf("%06d", i) + strings.Repeat("/x", length/2), Typeflag: tar.TypeReg, Format: tar.FormatPAX}))
		}
		for name, content := range dockerSet(t, CompressNone, two(t)) {
			must(t, w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: int64(len(content))}))
			_, err := w.Write(content)
			must(t, err)
		}
		must(t, w.Close())
		return write(t, squeeze(t, b.Bytes(), CompressZstd))
	}
	if _, grown, err := opened(t, archive(20, 1<<19)); err != nil || grown > 4<<20 {
		t.Errorf("long names: %v, %d KiB", err, grown>>10)
	}
	if _, _, err := opened(t, archive(10_000, 4000)); !errors.Is(err, ErrInvalid) {
		t.Errorf("many names: %v", err)
	}
}

// cancelling ends a context after some files have been opened.
type cancelling struct {
	files
	cancel context.CancelFunc
	left   int
}

func (c *cancelling) open(name string) (io.ReadCloser, int64, error) {
	if c.left--; c.left == 0 {
		c.cancel()
	}
	return c.files.open(name)
}

func (c *cancelling) Close() error { return nil }

// Reading metadata ends with the context.
func TestCancelMetadata(t *testing.T) {
	oci := ociSet(t, CompressNone, two(t), nil)
	docker := dockerSet(t, CompressNone, two(t))
	for kind, set := range map[string]fileset{KindOCI: oci, KindDocker: docker} {
		ctx, cancel := context.WithCancel(context.Background())
		c := &cancelling{memory(set), cancel, 2}
		if _, err := openSet(ctx, c, kind, Options{Platform: Platform{OS: "linux", Arch: "amd64"}}); !errors.Is(err, context.Canceled) || errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", kind, err)
		}
		if c.left < -2 {
			t.Errorf("%s: %d files were opened after the end", kind, -c.left)
		}
	}
}

// memory is a set of files without a place.
type memory fileset

func (m memory) open(name string) (io.ReadCloser, int64, error) {
	b, ok := m[name]
	if !ok {
		return nil, 0, fs.ErrNotExist
	}
	return io.NopCloser(bytes.NewReader(b)), int64(len(b)), nil
}

func (m memory) Close() error { return nil }
