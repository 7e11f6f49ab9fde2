package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
)

const shipped = "../../../../testdata/image/busybox.tar"

// The shipped image is what this program makes of the busybox in it.
func TestShippedImageIsReproducible(t *testing.T) {
	src, err := image.Open(context.Background(), shipped, image.Options{Platform: image.Platform{OS: "linux", Arch: "amd64"}, TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	files := map[string][]byte{}
	for i, l := range src.Images[0].Layers {
		s, err := l.Open(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		tr := tar.NewReader(s)
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.Name == busyboxPath || h.Name == copyrightPath {
				if files[h.Name], err = io.ReadAll(tr); err != nil {
					t.Fatal(err)
				}
			}
		}
		if _, err := io.Copy(io.Discard, s); err != nil || !s.Verified() {
			t.Errorf("layer %d: %v", i, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	got, err := build(files[busyboxPath], files[copyrightPath])
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(shipped)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes, shipped are %d: they differ", len(got), len(want))
	}
}
