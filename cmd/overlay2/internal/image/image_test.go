package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func open(t testing.TB, path string, opts Options) (*Source, error) {
	t.Helper()
	opts.TempDir = t.TempDir()
	opts.Platform = Platform{OS: "linux", Arch: "amd64"}
	s, err := Open(context.Background(), path, opts)
	left, rerr := os.ReadDir(opts.TempDir)
	must(t, rerr)
	if len(left) > 0 {
		t.Errorf("left in the temporary directory: %v", left)
	}
	if err == nil {
		t.Cleanup(func() { must(t, s.Close()) })
	}
	return s, err
}

// read returns the layers' tars, verified.
func read(img *Image) ([][]byte, error) {
	var all [][]byte
	for _, l := range img.Layers {
		s, err := l.Open(context.Background())
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(s)
		if cerr := s.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return nil, err
		}
		if !s.Verified() {
			return nil, errors.New("not verified")
		}
		all = append(all, b)
	}
	return all, nil
}

func TestEveryFormAndCompression(t *testing.T) {
	compressions := []string{CompressNone, CompressGzip, CompressZstd}
	for _, inner := range compressions {
		oci := ociSet(t, inner, two(t), nil)
		docker := dockerSet(t, inner, two(t))
		both := fileset{}
		for _, s := range []fileset{oci, docker} {
			for n, b := range s {
				both[n] = b
			}
		}
		for _, c := range []struct {
			form, kind string
			set        fileset
		}{{"oci", KindOCI, oci}, {"docker", KindDocker, docker}, {"docker25", KindOCI, both}} {
			check := func(t *testing.T, path string) {
				s, err := open(t, path, Options{})
				must(t, err)
				if s.Kind != c.kind || len(s.Images) != 1 {
					t.Fatalf("kind %q with %d images", s.Kind, len(s.Images))
				}
				got, err := read(s.Images[0])
				must(t, err)
				for i, want := range two(t) {
					if !bytes.Equal(got[i], want) {
						t.Errorf("layer %d differs", i)
					}
				}
				want := "demo/app:v1"
				if c.form == "oci" {
					want = "v1"
				}
				if n := s.Images[0].Names; len(n) != 1 || n[0] != want {
					t.Errorf("names %q", n)
				}
			}
			t.Run(c.form+"/"+inner+"/dir", func(t *testing.T) { check(t, c.set.dir(t)) })
			for _, outer := range compressions {
				t.Run(c.form+"/"+inner+"/tar-"+outer, func(t *testing.T) { check(t, c.set.file(t, outer, "./")) })
			}
		}
	}
}

func TestRootfs(t *testing.T) {
	for _, how := range []string{CompressNone, CompressGzip, CompressZstd} {
		for name, tarball := range map[string][]byte{
			"ordinary": two(t)[0],
			"odd":      pack(t, "hello", "world"),
			"inside":   pack(t, "usr/", "", "usr/manifest.json", "[]"),
		} {
			t.Run(how+"/"+name, func(t *testing.T) {
				packed := squeeze(t, tarball, how)
				for _, path := range []string{write(t, packed), "-"} {
					s, err := open(t, path, Options{Stdin: bytes.NewReader(packed)})
					must(t, err)
					got, err := read(s.Images[0])
					must(t, err)
					if s.Kind != KindRootfs || len(got) != 1 || !bytes.Equal(got[0], tarball) {
						t.Errorf("%s: kind %q, %d layers", path, s.Kind, len(got))
					}
				}
			})
		}
	}
}

// A root filesystem that looks like an image can be imported by saying what it is.
func TestKindForced(t *testing.T) {
	path := write(t, pack(t, "manifest.json", "{}", "app", "x"))
	if _, err := open(t, path, Options{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("taken for an image: %v", err)
	}
	s, err := open(t, path, Options{Kind: KindRootfs})
	must(t, err)
	if s.Kind != KindRootfs {
		t.Error(s.Kind)
	}
}

func TestChainIDs(t *testing.T) {
	a, b := digest.FromString("a"), digest.FromString("b")
	got := ChainIDs([]digest.Digest{a, b})
	if got[0] != a || got[1] != digest.FromString(a.String()+" "+b.String()) {
		t.Error(got)
	}
}

func TestPlatform(t *testing.T) {
	layers := two(t)
	set := ociSet(t, CompressGzip, layers, nil)
	arm := ociSet(t, CompressGzip, layers[:1], nil)
	desc := func(s fileset, arch string) v1.Descriptor {
		var d v1.Descriptor
		for name, b := range s {
			if strings.Contains(string(b), `"layers":[`) && strings.HasPrefix(name, "blobs/") && strings.Contains(string(b), "schemaVersion") {
				d = v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(b), Size: int64(len(b))}
			}
		}
		d.Platform = &v1.Platform{OS: "linux", Architecture: arch}
		return d
	}
	ours, theirs := desc(set, "amd64"), desc(arm, "arm64")
	proof := v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1, Annotations: map[string]string{attestation: "attestation-manifest"}}
	for name, b := range arm {
		set[name] = b
	}
	inner := set.put(v1.MediaTypeImageIndex, asJSON(t, v1.Index{Manifests: []v1.Descriptor{proof, theirs, ours}}))
	for name, list := range map[string][]v1.Descriptor{"flat": {theirs, proof, ours}, "nested": {inner}} {
		set["index.json"] = asJSON(t, v1.Index{Manifests: list})
		s, err := open(t, set.dir(t), Options{})
		must(t, err)
		if n := len(s.Images[0].Layers); len(s.Images) != 1 || n != 2 {
			t.Errorf("%s: %d images, %d layers", name, len(s.Images), n)
		}
	}
	set["index.json"] = asJSON(t, v1.Index{Manifests: []v1.Descriptor{theirs}})
	if _, err := open(t, set.dir(t), Options{}); !errors.Is(err, ErrPlatform) || !strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("another platform: %v", err)
	}
	for _, bad := range []string{"linux/", "a/b/c/d", "/amd64"} {
		if _, err := ParsePlatform(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// Each of these must end in a clear error, at Open or while a layer is read.
func TestHostile(t *testing.T) {
	layers := two(t)
	firstLayer := func(b *built) string { return blobName(b.manifest.Layers[0].Digest) }
	cases := map[string]struct {
		want error
		text string
		set  fileset
	}{
		"layer blob changed": {ErrDigest, "layer sha256:", ociSet(t, CompressNone, layers, func(b *built) {
			c := bytes.Clone(b.set[firstLayer(b)])
			c[600] ^= 1
			b.set[firstLayer(b)] = c
		})},
		"gzip layer changed": {ErrInvalid, "layer sha256:", ociSet(t, CompressGzip, layers, func(b *built) {
			c := bytes.Clone(b.set[firstLayer(b)])
			c[len(c)-5] ^= 1
			b.set[firstLayer(b)] = c
		})},
		"layer cut off": {ErrDigest, "bytes, not", ociSet(t, CompressGzip, layers, func(b *built) {
			b.set[firstLayer(b)] = b.set[firstLayer(b)][:40]
		})},
		"layer with more behind": {ErrDigest, "bytes, not", ociSet(t, CompressGzip, layers, func(b *built) {
			b.set[firstLayer(b)] = append(bytes.Clone(b.set[firstLayer(b)]), "more"...)
		})},
		"gzip cut off and honestly described": {ErrInvalid, "unexpected EOF", ociSet(t, CompressGzip, layers, func(b *built) {
			c := b.set[firstLayer(b)]
			b.manifest.Layers[0] = b.set.put(v1.MediaTypeImageLayerGzip, c[:len(c)-20])
		})},
		"zstd cut off": {ErrInvalid, "layer sha256:", ociSet(t, CompressZstd, layers, func(b *built) {
			c := b.set[firstLayer(b)]
			b.manifest.Layers[0] = b.set.put(v1.MediaTypeImageLayerZstd, c[:len(c)-20])
		})},
		"right blob, other tar": {ErrDigest, "the tar is", ociSet(t, CompressGzip, layers, func(b *built) {
			b.manifest.Layers[0] = b.set.put(v1.MediaTypeImageLayerGzip, squeeze(t, pack(t, "evil", "x"), CompressGzip))
		})},
		"layers swapped": {ErrDigest, "the tar is", ociSet(t, CompressGzip, layers, func(b *built) {
			l := b.manifest.Layers
			l[0], l[1] = l[1], l[0]
		})},
		"blob missing": {ErrMissing, "blob sha256:", ociSet(t, CompressGzip, layers, func(b *built) { delete(b.set, firstLayer(b)) })},
		"config missing": {ErrMissing, "blob sha256:", ociSet(t, CompressGzip, layers, func(b *built) {
			delete(b.set, blobName(b.manifest.Config.Digest))
		})},
		"unknown layer type": {ErrUnsupported, "x-evil", ociSet(t, CompressGzip, layers, func(b *built) { b.manifest.Layers[1].MediaType = "application/x-evil" })},
		"encrypted layer": {ErrUnsupported, "encrypted", ociSet(t, CompressGzip, layers, func(b *built) {
			b.manifest.Layers[1].MediaType += "+encrypted"
		})},
		"unknown config type":        {ErrUnsupported, "x-evil", ociSet(t, CompressGzip, layers, func(b *built) { b.manifest.Config.MediaType = "application/x-evil" })},
		"digest climbs out":          {ErrInvalid, "digest", ociSet(t, CompressGzip, layers, func(b *built) { b.manifest.Layers[0].Digest = "sha256:../../../../etc/passwd" })},
		"digest of another kind":     {ErrInvalid, "digest", ociSet(t, CompressGzip, layers, func(b *built) { b.manifest.Layers[0].Digest = "md5:d41d8cd98f00b204e9800998ecf8427e" })},
		"negative size":              {ErrDigest, "bytes, not -1", ociSet(t, CompressGzip, layers, func(b *built) { b.manifest.Layers[0].Size = -1 })},
		"fewer layers than diff ids": {ErrInvalid, "2 diff ids", ociSet(t, CompressGzip, layers, func(b *built) { b.manifest.Layers = b.manifest.Layers[:1] })},
		"config of garbage": {ErrInvalid, "config", ociSet(t, CompressGzip, layers, func(b *built) {
			b.manifest.Config = b.set.put(v1.MediaTypeImageConfig, []byte("{{{"))
		})},
		"config with paths for diff ids": {ErrInvalid, "no sha256 digest", ociSet(t, CompressGzip, layers, func(b *built) {
			b.manifest.Config = b.set.put(v1.MediaTypeImageConfig, []byte(`{"rootfs":{"type":"layers","diff_ids":["../../evil","sha256:/../x"]}}`))
		})},
		"config of no layers type": {ErrInvalid, "rootfs type", ociSet(t, CompressGzip, layers, func(b *built) {
			b.manifest.Config = b.set.put(v1.MediaTypeImageConfig, []byte(`{"rootfs":{"type":"evil"}}`))
		})},
		"huge config": {ErrInvalid, "more than", ociSet(t, CompressGzip, layers, func(b *built) {
			b.manifest.Config = b.set.put(v1.MediaTypeImageConfig, make([]byte, maxConfig+1))
		})},
		"bzip2 layer": {ErrUnsupported, "bzip2", ociSet(t, CompressGzip, layers, func(b *built) {
			b.manifest.Layers[0] = b.set.put(v1.MediaTypeImageLayer, []byte("BZh91AY&SY and so on"))
		})},
		"docker: config climbs out": {ErrInvalid, "", fileset{"manifest.json": []byte(`[{"Config":"../../../etc/passwd","Layers":[]}]`)}},
		"docker: layer climbs out": {ErrInvalid, "", fileset{
			"c.json": configOf(t, layers[:1]), "manifest.json": []byte(`[{"Config":"c.json","Layers":["../../../etc/passwd"]}]`)}},
		"docker: absolute layer": {ErrInvalid, "", fileset{
			"c.json": configOf(t, layers[:1]), "manifest.json": []byte(`[{"Config":"c.json","Layers":["/etc/passwd"]}]`)}},
		"docker: layer missing": {ErrMissing, "a/layer.tar", fileset{
			"c.json": configOf(t, layers[:1]), "manifest.json": []byte(`[{"Config":"c.json","Layers":["a/layer.tar"]}]`)}},
		"docker: config of another digest": {ErrDigest, "the config is", fileset{
			digest.FromString("x").Encoded() + ".json": configOf(t, nil),
			"manifest.json": []byte(`[{"Config":"` + digest.FromString("x").Encoded() + `.json","Layers":[]}]`)}},
		"docker: layer changed": {ErrDigest, "the tar is", fileset{
			"c.json": configOf(t, layers[:1]), "a": layers[1], "manifest.json": []byte(`[{"Config":"c.json","Layers":["a"]}]`)}},
		"docker: no image":           {ErrInvalid, "no image", fileset{"manifest.json": []byte(`[]`)}},
		"layout of the future":       {ErrUnsupported, "version", fileset{"oci-layout": []byte(`{"imageLayoutVersion":"9.0"}`)}},
		"layout without an index":    {ErrMissing, "index.json", fileset{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}},
		"layout with an empty index": {ErrInvalid, "no image", fileset{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": []byte(`{}`)}},
	}
	for name, c := range cases {
		for form, path := range map[string]string{"dir": c.set.dir(t), "tar": c.set.file(t, CompressNone, "")} {
			t.Run(name+"/"+form, func(t *testing.T) {
				s, err := open(t, path, Options{})
				if err == nil {
					_, err = read(s.Images[0])
				}
				if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
					t.Errorf("got %v, want %v with %q", err, c.want, c.text)
				}
			})
		}
	}
}

func TestIndexInIndexWithoutEnd(t *testing.T) {
	set := ociSet(t, CompressGzip, two(t), nil)
	var index v1.Index
	index.Manifests = []v1.Descriptor{{MediaType: "application/x", Digest: digest.FromString(""), Size: 0}}
	for range maxIndexDepth + 2 {
		d := set.put(v1.MediaTypeImageIndex, asJSON(t, index))
		index.Manifests = []v1.Descriptor{d}
	}
	set["index.json"] = asJSON(t, index)
	if _, err := open(t, set.dir(t), Options{}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "indexes") {
		t.Error(err)
	}
}

func TestNoImage(t *testing.T) {
	empty := t.TempDir()
	fifo := filepath.Join(t.TempDir(), "x")
	must(t, os.Symlink("/dev/null", fifo))
	for name, path := range map[string]string{
		"empty directory": empty, "device": fifo,
		"empty file": write(t, nil), "text": write(t, bytes.Repeat([]byte("no tar at all\n"), 100)),
		"short gzip": write(t, []byte("\x1f\x8b")), "empty tar": write(t, make([]byte, 1024)),
		"cut-off archive": write(t, ociSet(t, CompressGzip, two(t), nil).cut(t)),
	} {
		if _, err := open(t, path, Options{}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := open(t, filepath.Join(empty, "absent"), Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}

// cut returns an archive that ends within its last body.
func (s fileset) cut(t *testing.T) []byte {
	b, err := os.ReadFile(s.file(t, CompressNone, ""))
	must(t, err)
	return b[:len(b)-1024-500]
}

// A blob that is a symlink out of the layout is not read.
func TestSymlinkOutOfLayout(t *testing.T) {
	set := ociSet(t, CompressNone, two(t)[:1], nil)
	dir := set.dir(t)
	name := filepath.Join(dir, blobName(digest.FromBytes(two(t)[0])))
	out := write(t, two(t)[0])
	must(t, os.Remove(name))
	must(t, os.Symlink(out, name))
	if _, err := open(t, dir, Options{}); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
}

// docker save before 25 writes a repeated layer as a symlink to the first.
func TestLayerLinkInArchive(t *testing.T) {
	layer := two(t)[0]
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, body := range map[string][]byte{
		"a/layer.tar": layer, "c.json": configOf(t, [][]byte{layer, layer}),
		"manifest.json": []byte(`[{"Config":"c.json","Layers":["a/layer.tar","b/layer.tar"]}]`),
	} {
		must(t, w.WriteHeader(&tar.Header{Name: name, Size: int64(len(body)), Mode: 0o644}))
		_, err := w.Write(body)
		must(t, err)
	}
	must(t, w.WriteHeader(&tar.Header{Name: "b/layer.tar", Typeflag: tar.TypeSymlink, Linkname: "../a/layer.tar"}))
	must(t, w.Close())
	s, err := open(t, write(t, b.Bytes()), Options{})
	must(t, err)
	if got, err := read(s.Images[0]); err != nil || len(got) != 2 {
		t.Error(err)
	}
}

// Ctrl-C ends the waiting for a pipe that stays silent.
func TestCancelSilentInput(t *testing.T) {
	r, w := io.Pipe()
	defer w.Close()
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := Open(ctx, "-", Options{Stdin: r, TempDir: t.TempDir()}); !errors.Is(err, context.Canceled) || errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s, err := Open(ctx, ociSet(t, CompressGzip, two(t), nil).dir(t), Options{TempDir: t.TempDir(), Platform: Platform{OS: "linux", Arch: "amd64"}})
	must(t, err)
	cancel()
	st, err := s.Images[0].Layers[0].Open(ctx)
	if err == nil {
		_, err = io.Copy(io.Discard, st)
	}
	if !errors.Is(err, context.Canceled) || errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	must(t, s.Close())
}

// Whatever an archive holds, it is an image or an error, soon and within little memory. The
// decompressors have goroutines, so coverage varies: fuzz with -fuzzminimizetime 1x.
func FuzzOpen(f *testing.F) {
	for _, set := range []fileset{ociSet(f, CompressGzip, two(f), nil), dockerSet(f, CompressZstd, two(f))} {
		for _, how := range []string{CompressNone, CompressGzip, CompressZstd} {
			b, err := os.ReadFile(set.file(f, how, ""))
			must(f, err)
			f.Add(b)
		}
	}
	f.Add(two(f)[0])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		s, err := Open(t.Context(), write(t, b), Options{TempDir: t.TempDir(), Platform: Platform{OS: "linux", Arch: "amd64"}})
		if err != nil {
			return
		}
		for _, img := range s.Images {
			for _, l := range img.Layers {
				st, err := l.Open(t.Context())
				if err != nil {
					continue
				}
				n, err := io.Copy(io.Discard, io.LimitReader(st, 64<<20))
				if err == nil && n < 64<<20 != st.Verified() {
					t.Error("ended well without being verified, or the reverse")
				}
				must(t, st.Close())
			}
		}
		must(t, s.Close())
	})
}
