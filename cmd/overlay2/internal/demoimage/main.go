// Command demoimage makes the image of make demo, testdata/image/busybox.tar: an OCI
// archive of five layers with one of everything a layer can hold. The same busybox makes
// the same bytes; testdata/image/README.md is the record of the one that ships.
//
//	dpkg-deb -x busybox-static_*.deb DIR && demoimage -o busybox.tar DIR
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"encoding/json"

	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	out := flag.String("o", "busybox.tar", "file to write")
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(flag.Arg(0), *out); err != nil {
		fmt.Fprintln(os.Stderr, "demoimage:", err)
		os.Exit(1)
	}
}

// The files that are taken from the package.
const (
	busyboxPath   = "bin/busybox"
	copyrightPath = "usr/share/doc/busybox-static/copyright"
)

func run(dir, out string) error {
	files := map[string][]byte{}
	for _, name := range []string{busyboxPath, copyrightPath} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		files[name] = b
	}
	b, err := build(files[busyboxPath], files[copyrightPath])
	if err != nil {
		return err
	}
	return os.WriteFile(out, b, 0o644)
}

// epoch is the time of everything in the image: fixed, with nanoseconds that show whether
// they are kept.
var epoch = time.Date(2024, 2, 29, 12, 34, 56, 123456789, time.UTC)

// build returns the archive.
func build(busybox, copyright []byte) (_ []byte, err error) {
	tmp, err := os.MkdirTemp("", "demoimage-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	w, err := image.NewWriter(tmp)
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	c := v1.Image{
		Created:  &epoch,
		Platform: v1.Platform{OS: "linux", Architecture: "amd64"},
		Config:   v1.ImageConfig{Cmd: []string{"/bin/sh"}, Env: []string{"PATH=/bin:/usr/local/bin"}},
	}
	for _, l := range layers(busybox, copyright) {
		tarball, err := pack(l.entries)
		if err != nil {
			return nil, fmt.Errorf("layer %q: %w", l.what, err)
		}
		if _, err := w.AddLayer(ctx, bytes.NewReader(tarball), l.compress, ""); err != nil {
			return nil, err
		}
		c.History = append(c.History, v1.History{Created: &epoch, CreatedBy: "demoimage: " + l.what})
	}
	c.RootFS = v1.RootFS{Type: "layers", DiffIDs: w.DiffIDs()}
	config, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	if _, err := w.Finish(config, "overlay2/busybox:demo"); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = image.WriteTar(ctx, tmp, &b)
	return b.Bytes(), err
}
