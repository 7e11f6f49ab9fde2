package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// tarOf makes a tar of name, content pairs. A name that ends in / is a directory.
func tarOf(t testing.TB, pairs ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(pairs); i += 2 {
		h := &tar.Header{Name: pairs[i], Mode: 0o644, Size: int64(len(pairs[i+1])), Typeflag: tar.TypeReg}
		if strings.HasSuffix(h.Name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		must(t, w.WriteHeader(h))
		_, err := io.WriteString(w, pairs[i+1])
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// pressed compresses b.
func pressed(t testing.TB, b []byte, how string) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	switch how {
	case image.CompressGzip:
		w = gzip.NewWriter(&out)
	case image.CompressZstd:
		var err error
		w, err = zstd.NewWriter(&out)
		must(t, err)
	default:
		return b
	}
	_, err := w.Write(b)
	must(t, err)
	must(t, w.Close())
	return out.Bytes()
}

// source is an image as files by name.
type source map[string][]byte

func (s source) put(media string, b []byte) v1.Descriptor {
	d := v1.Descriptor{MediaType: media, Digest: digest.FromBytes(b), Size: int64(len(b))}
	s["blobs/sha256/"+d.Digest.Encoded()] = b
	return d
}

func (s source) putJSON(t testing.TB, media string, v any) v1.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	must(t, err)
	return s.put(media, b)
}

func configFor(layers [][]byte) v1.Image {
	c := v1.Image{Platform: v1.Platform{OS: "linux", Architecture: "amd64"}, RootFS: v1.RootFS{Type: "layers"}}
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromBytes(l))
	}
	return c
}

// ociSource makes an OCI layout. edit may change the manifest before it is stored.
func ociSource(t testing.TB, how string, layers [][]byte, edit func(source, *v1.Manifest)) source {
	t.Helper()
	s := source{}
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: s.putJSON(t, v1.MediaTypeImageConfig, configFor(layers))}
	m.SchemaVersion = 2
	for _, l := range layers {
		media := v1.MediaTypeImageLayer
		if how != image.CompressNone {
			media += "+" + how
		}
		m.Layers = append(m.Layers, s.put(media, pressed(t, l, how)))
	}
	if edit != nil {
		edit(s, &m)
	}
	index := v1.Index{Manifests: []v1.Descriptor{s.putJSON(t, v1.MediaTypeImageManifest, m)}}
	index.SchemaVersion = 2
	b, err := json.Marshal(index)
	must(t, err)
	s["index.json"] = b
	s["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	return s
}

// dockerSource makes what docker save wrote before Docker 25; with the OCI form beside it, after.
func dockerSource(t testing.TB, how string, layers [][]byte) source {
	t.Helper()
	s := source{}
	config, err := json.Marshal(configFor(layers))
	must(t, err)
	name := digest.FromBytes(config).Encoded() + ".json"
	s[name] = config
	var paths []string
	for i, l := range layers {
		p := fmt.Sprintf("%064x/layer.tar", i)
		s[p] = pressed(t, l, how)
		paths = append(paths, p)
	}
	s["manifest.json"], err = json.Marshal([]map[string]any{{"Config": name, "RepoTags": []string{"demo:v1"}, "Layers": paths}})
	must(t, err)
	return s
}

func (s source) dir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range s {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, b, 0o644))
	}
	return dir
}

func (s source) file(t testing.TB, how string) string {
	t.Helper()
	var pairs []string
	for name, b := range s {
		pairs = append(pairs, name, string(b))
	}
	path := filepath.Join(t.TempDir(), "archive")
	must(t, os.WriteFile(path, pressed(t, tarOf(t, pairs...), how), 0o644))
	return path
}

// someLayers are three layers with a deletion.
func someLayers(t testing.TB) [][]byte {
	return [][]byte{
		tarOf(t, "etc/", "", "etc/motd", "hello\n", "etc/old", "old"),
		tarOf(t, "etc/", "", "etc/.wh.old", "", "etc/new", "new"),
		tarOf(t, "etc/", "", "etc/motd", "changed\n"),
	}
}

// Every form of source in every compression, outside and inside, gives the same tree.
func TestImportEverySource(t *testing.T) {
	compressions := []string{image.CompressNone, image.CompressGzip, image.CompressZstd}
	want := map[string]string{"etc/motd": "changed\n", "etc/new": "new"}
	check := func(t *testing.T, path string) {
		o := newTool(t)
		o.do("import", path, "--name", "x")
		dir := o.mount("box", "x")
		for name, content := range want {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != content {
				t.Errorf("%s: %q, %v", name, b, err)
			}
		}
		if entries, err := os.ReadDir(filepath.Join(dir, "etc")); err != nil || len(entries) != 2 {
			t.Errorf("etc: %v, %v", entries, err)
		}
		o.do("umount", "box")
		o.do("check")
		o.do("rm", "box", "x")
		o.empty()
	}
	for _, inner := range compressions {
		oci, docker := ociSource(t, inner, someLayers(t), nil), dockerSource(t, inner, someLayers(t))
		both := source{}
		for _, s := range []source{oci, docker} {
			for name, b := range s {
				both[name] = b
			}
		}
		for form, s := range map[string]source{"oci": oci, "docker": docker, "docker-25": both} {
			t.Run(form+"/"+inner+"/directory", func(t *testing.T) { check(t, s.dir(t)) })
			for _, outer := range compressions {
				t.Run(form+"/"+inner+"/"+outer, func(t *testing.T) { check(t, s.file(t, outer)) })
			}
		}
	}
	for _, how := range compressions {
		t.Run("rootfs/"+how, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "rootfs")
			must(t, os.WriteFile(path, pressed(t, tarOf(t, "etc/", "", "etc/motd", "changed\n", "etc/new", "new"), how), 0o644))
			check(t, path)
		})
	}
}

// A source with something wrong: code 5, an error that says what, and nothing is left but
// what was there before.
func TestBadSourcesLeaveNothing(t *testing.T) {
	layers := someLayers(t)
	last := func(m *v1.Manifest) string { return "blobs/sha256/" + m.Layers[2].Digest.Encoded() }
	oci := func(how string, edit func(source, *v1.Manifest)) source { return ociSource(t, how, layers, edit) }
	cases := map[string]struct {
		says string
		s    source
	}{
		"wrong digest": {"digest mismatch", oci(image.CompressNone, func(s source, m *v1.Manifest) {
			b := bytes.Clone(s[last(m)])
			b[len(b)-1] = 1 // in the padding: only the digest can tell
			s[last(m)] = b
		})},
		"wrong diff id": {"digest mismatch", oci(image.CompressGzip, func(s source, m *v1.Manifest) {
			m.Layers[2] = s.put(v1.MediaTypeImageLayerGzip, pressed(t, tarOf(t, "etc/evil", ""), image.CompressGzip))
		})},
		"truncated layer": {"has", oci(image.CompressGzip, func(s source, m *v1.Manifest) {
			s[last(m)] = s[last(m)][:50]
		})},
		"truncated gzip, honest size": {"unexpected EOF", oci(image.CompressGzip, func(s source, m *v1.Manifest) {
			b := s[last(m)]
			m.Layers[2] = s.put(v1.MediaTypeImageLayerGzip, b[:len(b)-12])
		})},
		"truncated zstd, honest size": {"layer sha256:", oci(image.CompressZstd, func(s source, m *v1.Manifest) {
			b := s[last(m)]
			m.Layers[2] = s.put(v1.MediaTypeImageLayerZstd, b[:len(b)-12])
		})},
		"missing blob":       {"missing", oci(image.CompressGzip, func(s source, m *v1.Manifest) { delete(s, last(m)) })},
		"unknown media type": {"x-evil", oci(image.CompressGzip, func(_ source, m *v1.Manifest) { m.Layers[2].MediaType = "application/x-evil" })},
		"hostile config": {"rootfs type", oci(image.CompressGzip, func(s source, m *v1.Manifest) {
			m.Config = s.put(v1.MediaTypeImageConfig, []byte(`{"rootfs":{"type":"../../x","diff_ids":["../../x"]}}`))
		})},
		"diff ids of paths": {"no sha256 digest", oci(image.CompressGzip, func(s source, m *v1.Manifest) {
			m.Config = s.put(v1.MediaTypeImageConfig, []byte(`{"rootfs":{"type":"layers","diff_ids":["sha256:../../../../../../tmp/x"]}}`))
		})},
		"digest of a path": {"digest", oci(image.CompressGzip, func(_ source, m *v1.Manifest) { m.Layers[2].Digest = "sha256:../../../../etc/passwd" })},
		"not a tar": {"malformed tar", oci(image.CompressNone, func(s source, m *v1.Manifest) {
			b := bytes.Repeat([]byte("junk"), 1024)
			m.Layers[2] = s.put(v1.MediaTypeImageLayer, b)
			c := configFor(layers)
			c.RootFS.DiffIDs[2] = digest.FromBytes(b)
			m.Config = s.putJSON(t, v1.MediaTypeImageConfig, c)
		})},
		"docker: path": {"invalid", source{"manifest.json": []byte(`[{"Config":"../../../../etc/passwd","Layers":["../x"]}]`)}},
	}
	for name, c := range cases {
		for form, path := range map[string]string{"directory": c.s.dir(t), "archive": c.s.file(t, image.CompressGzip)} {
			t.Run(name+"/"+form, func(t *testing.T) {
				o := newTool(t)
				code, out, said := o.try("import", path, "--name", "bad")
				if code != exitImage || out != "" || !strings.Contains(said, c.says) {
					t.Errorf("code %d, said %q, printed %q", code, said, out)
				}
				if o.do("ls"); o.store(t) {
					o.do("check")
				}
				// An image that shares the first layer is not harmed by the failure.
				good := ociSource(t, image.CompressGzip, layers[:1], nil).dir(t)
				o.do("import", good, "--name", "good")
				if code, _, _ := o.try("import", path, "--name", "bad"); code == exitOK {
					t.Error("imported the second time")
				}
				o.do("check")
				dir := o.mount("box", "good")
				if b, err := os.ReadFile(filepath.Join(dir, "etc/old")); err != nil || string(b) != "old" {
					t.Errorf("the good image: %q, %v", b, err)
				}
				o.do("umount", "box")
				o.do("rm", "box", "good")
				o.empty()
			})
		}
	}
}

// store reports whether the root has been made.
func (o *tool) store(t *testing.T) bool {
	t.Helper()
	_, err := os.Stat(filepath.Join(o.root, "overlay2"))
	return err == nil
}

// Layers that two images share are stored once, and stay as long as one of them needs them.
func TestSharedLayers(t *testing.T) {
	o := newTool(t)
	layers := someLayers(t)
	o.do("import", ociSource(t, image.CompressGzip, layers, nil).dir(t), "--name", "three")
	var r struct{ Images []imported }
	o.json(&r, "import", dockerSource(t, image.CompressZstd, layers[:2]).dir(t), "--name", "two")
	if slices.ContainsFunc(r.Images[0].Layers, func(l importedLayer) bool { return l.New }) {
		t.Errorf("%+v", r)
	}
	o.do("rm", "three")
	dir := o.mount("box", "two")
	if _, err := os.Stat(filepath.Join(dir, "etc/new")); err != nil {
		t.Error(err)
	}
	o.fails(exitConflict, "in use by layer box", "rm", "two")
	o.do("umount", "box")
	o.do("rm", "box", "two")
	o.empty()
}

// Names: the source's, a tag of it, several in an archive, another image's.
func TestNamesOfImports(t *testing.T) {
	o := newTool(t)
	layers := someLayers(t)
	dir := filepath.Join(t.TempDir(), "thing.tar.gz")
	must(t, os.Rename(ociSource(t, image.CompressGzip, layers, nil).file(t, image.CompressGzip), dir))
	if got := o.do("import", dir); !strings.HasPrefix(got, "thing:latest ") {
		t.Errorf("named %q", got)
	}
	o.do("import", dir) // the same again is fine
	other := dockerSource(t, image.CompressNone, layers[:1]).dir(t)
	o.fails(exitConflict, "exists already (use --replace)", "import", other, "--name", "thing:latest")
	o.do("import", other, "--name", "thing:latest", "--replace")
	o.do("import", other)
	o.do("rm", "thing", "demo:v1")

	pair := dockerSource(t, image.CompressNone, layers[:1])
	config, err := json.Marshal(configFor(layers[:2]))
	must(t, err)
	pair["second.json"] = config
	pair["second.tar"] = layers[1]
	pair["manifest.json"] = []byte(`[{"Config":"` + digest.FromBytes(mustJSON(t, configFor(layers[:1]))).Encoded() + `.json","RepoTags":["a:1","a:2"],"Layers":["` + fmt.Sprintf("%064x", 0) + `/layer.tar"]},
		{"Config":"second.json","RepoTags":["b:1"],"Layers":["` + fmt.Sprintf("%064x", 0) + `/layer.tar","second.tar"]}]`)
	path := pair.file(t, image.CompressZstd)
	o.fails(exitUsage, "choose one by --ref", "import", path, "--name", "x")
	o.fails(exitNotFound, `"b:1"`, "import", path, "--ref", "c:1")
	o.do("import", path, "--ref", "b:1", "--name", "x")
	o.do("import", path)
	var l listing
	o.json(&l, "ls")
	if len(l.Images) != 4 || len(l.Layers) < 2 {
		t.Errorf("%+v", l)
	}
	evil := source{"c.json": mustJSON(t, configFor(nil)), "manifest.json": []byte(`[{"Config":"c.json","RepoTags":["../../\u001b[2J"],"Layers":[]}]`)}
	o.fails(exitUsage, "give one by --name", "import", evil.dir(t))
	o.do("rm", "x", "a:1", "a:2", "b:1")
	o.empty()
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	must(t, err)
	return b
}

// An image of layers of nothing at all, and one without layers.
func TestEmptyImages(t *testing.T) {
	o := newTool(t)
	o.do("import", ociSource(t, image.CompressGzip, [][]byte{tarOf(t), tarOf(t)}, nil).dir(t), "--name", "hollow")
	o.do("import", ociSource(t, image.CompressGzip, nil, nil).dir(t), "--name", "none")
	for _, name := range []string{"hollow", "none"} {
		to := filepath.Join(t.TempDir(), "out.tar")
		o.do("export", name, "--to", to)
		o.do("import", to, "--name", name+"2")
		o.mount("on-"+name, name+"2")
		o.do("rm", "-f", "on-"+name)
	}
	o.do("rm", "hollow", "hollow2", "none", "none2")
	o.empty()
}

// Sources that GNU tar and gzip wrote.
func TestImportTarOfTar(t *testing.T) {
	overlaytest.Require(t, "cmd:tar")
	o := newTool(t)
	dir := ociSource(t, image.CompressGzip, someLayers(t), nil).dir(t)
	path := filepath.Join(t.TempDir(), "x.tar.gz")
	if out, err := exec.Command("tar", "-C", dir, "-czf", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	o.do("import", path)
	o.do("rm", "x")
	o.empty()
}

// A disk that is full: the error says so, and nothing is left.
func TestNoSpace(t *testing.T) {
	o := newTool(t)
	must(t, os.Mkdir(o.root, 0o700))
	must(t, unix.Mount("overlay2-test", o.root, "tmpfs", 0, "size=1500k"))
	defer func() { must(t, unix.Unmount(o.root, 0)) }()
	o.fails(exitFailure, "no space left on device", "import", shipped)
	o.do("check")
	o.empty()
	b, err := os.ReadFile(shipped)
	must(t, err)
	o.in = bytes.NewReader(append(b, make([]byte, 1<<20)...))
	o.fails(exitFailure, "no space left on device", "import", "-")
	o.empty()
}
