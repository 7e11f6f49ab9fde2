//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// image is what docker load takes: plain tars, the lowest first.
type image struct {
	name   string
	layers [][]byte
}

// archiveFiles reads the files of a tar.
func archiveFiles(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	files := make(map[string][]byte)
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return files
		}
		must(t, err)
		if h.Typeflag == tar.TypeReg {
			files[h.Name], err = io.ReadAll(tr)
			must(t, err)
		}
	}
}

// readLayers reads the layers of an image archive, unpacked.
func readLayers(t *testing.T, file string) (layers [][]byte) {
	t.Helper()
	f, err := os.Open(file)
	must(t, err)
	defer f.Close()
	files := archiveFiles(t, f)
	var manifest []struct{ Layers []string }
	must(t, json.Unmarshal(files["manifest.json"], &manifest))
	for _, name := range manifest[0].Layers {
		layers = append(layers, plain(t, files[name]))
	}
	return layers
}

func plain(t *testing.T, b []byte) []byte {
	t.Helper()
	var r io.Reader = bytes.NewReader(b)
	switch {
	case bytes.HasPrefix(b, []byte("\x1f\x8b")):
		z, err := gzip.NewReader(r)
		must(t, err)
		r = z
	case bytes.HasPrefix(b, []byte("\x28\xb5\x2f\xfd")):
		z, err := zstd.NewReader(r)
		must(t, err)
		defer z.Close()
		r = z
	}
	b, err := io.ReadAll(r)
	must(t, err)
	return b
}

// layerTar makes a layer of files: names and contents in turn.
func layerTar(t *testing.T, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		h := &tar.Header{Name: files[i], Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(files[i+1]))}
		must(t, w.WriteHeader(h))
		_, err := io.WriteString(w, files[i+1])
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// write writes the image as docker load takes it.
func (i image) write(t *testing.T, file string) {
	t.Helper()
	type history struct {
		CreatedBy string `json:"created_by"`
	}
	var config struct {
		Architecture string `json:"architecture"`
		OS           string `json:"os"`
		Config       struct{ Env, Cmd []string }
		Rootfs       struct {
			Type    string   `json:"type"`
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
		History []history `json:"history"`
	}
	config.Architecture, config.OS, config.Rootfs.Type = "amd64", "linux", "layers"
	config.Config.Env, config.Config.Cmd = []string{"PATH=/bin:/usr/local/bin"}, []string{"/bin/sh"}
	var files []string
	var names []string
	for n, l := range i.layers {
		name := fmt.Sprintf("%d.tar", n)
		names, files = append(names, name), append(files, name, string(l))
		config.Rootfs.DiffIDs = append(config.Rootfs.DiffIDs, fmt.Sprintf("sha256:%x", sha256.Sum256(l)))
		config.History = append(config.History, history{name})
	}
	b, err := json.Marshal(config)
	must(t, err)
	type entry struct {
		Config           string
		RepoTags, Layers []string
	}
	m, err := json.Marshal([]entry{{"config.json", []string{i.name}, names}})
	must(t, err)
	files = append(files, "config.json", string(b), "manifest.json", string(m))
	must(t, os.WriteFile(file, layerTar(t, files...), 0o600))
}

// checkSaved checks that what docker save wrote holds the very tars from which the image was loaded.
func (i image) checkSaved(t *testing.T, saved []byte) {
	t.Helper()
	files := archiveFiles(t, bytes.NewReader(saved))
	var manifest []struct{ Layers []string }
	must(t, json.Unmarshal(files["manifest.json"], &manifest))
	if len(manifest) != 1 || len(manifest[0].Layers) != len(i.layers) {
		t.Fatalf("%s: saved as %v, not %d layers", i.name, manifest, len(i.layers))
	}
	for n, name := range manifest[0].Layers {
		if !bytes.Equal(files[name], i.layers[n]) {
			t.Errorf("%s: layer %d was saved with other bytes than it was loaded with", i.name, n)
		}
	}
}
