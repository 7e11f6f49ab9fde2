package image

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	gcrlayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
)

// written writes the pair of layers to a layout.
func written(t *testing.T, how string) string {
	t.Helper()
	dir := t.TempDir()
	w, err := NewWriter(dir)
	must(t, err)
	for _, l := range two(t) {
		_, err := w.AddLayer(context.Background(), bytes.NewReader(l), how, digest.FromBytes(l))
		must(t, err)
	}
	_, err = w.Finish(configOf(t, two(t)), "demo/app:v1")
	must(t, err)
	must(t, w.Abort()) // after Finish it does nothing
	return dir
}

func TestWriteAndReadBack(t *testing.T) {
	for _, how := range []string{CompressNone, CompressGzip, CompressZstd} {
		dir := written(t, how)
		archives := map[bool]string{}
		for _, second := range []bool{false, true} {
			var b bytes.Buffer
			must(t, WriteTar(context.Background(), map[bool]string{false: dir, true: written(t, how)}[second], &b))
			archives[second] = b.String()
		}
		if archives[false] != archives[true] {
			t.Errorf("%s: written twice, two archives", how)
		}
		for _, path := range []string{dir, write(t, []byte(archives[false]))} {
			s, err := open(t, path, Options{})
			must(t, err)
			got, err := read(s.Images[0])
			must(t, err)
			if s.Kind != KindOCI || !bytes.Equal(got[0], two(t)[0]) || !bytes.Equal(got[1], two(t)[1]) || s.Images[0].Names[0] != "demo/app:v1" {
				t.Errorf("%s %s: other layers or names", how, path)
			}
		}
		if how != CompressGzip {
			continue // all that validate.Index reads
		}
		index, err := gcrlayout.ImageIndexFromPath(dir)
		must(t, err)
		if err := validate.Index(index); err != nil {
			t.Errorf("%s: go-containerregistry: %v", how, err)
		}
	}
}

func TestWriterRefuses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	w, err := NewWriter(dir)
	must(t, err)
	if _, err := w.AddLayer(context.Background(), bytes.NewReader(nil), "lzma", ""); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
	if _, err := w.AddLayer(context.Background(), bytes.NewReader(two(t)[1]), CompressGzip, digest.FromString("x")); !errors.Is(err, ErrDigest) || len(w.DiffIDs()) != 0 {
		t.Error(err)
	}
	_, err = w.AddLayer(context.Background(), bytes.NewReader(two(t)[1]), CompressGzip, "")
	must(t, err)
	if _, err := w.Finish(configOf(t, two(t)), ""); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	if _, err := w.Finish(configOf(t, two(t)[:1]), ""); !errors.Is(err, ErrDigest) {
		t.Error(err)
	}
	must(t, w.Abort())
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Error("an aborted layout is left")
	}
}

func TestTags(t *testing.T) {
	for name, want := range map[string]string{"a": "latest", "a:b": "b", "host:5000/a": "latest", "host:5000/a:b": "b", "a:b@sha256:x": "b"} {
		if got := tagOf(name); got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := repoTags("Not Docker's"); got != nil {
		t.Error(got)
	}
	if got := repoTags("demo"); len(got) != 1 || got[0] != "demo:latest" {
		t.Error(got)
	}
}
