//go:build linux

// Command build makes an image from another one: its layers are unpacked side by side, a command runs in a
// layer over them, and what it changed becomes the layer that the new image has more.
//
//	build BASE NEW COMMAND
//
// BASE and NEW are OCI layouts, NEW a directory that is made. It needs root. Layers stay below
// $OVERLAY2_HOME (/var/tmp/overlay2-build) for the next build with the same base.
package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log"
	"os"
	"os/exec"
	"slices"
	"syscall"

	"github.com/bcc2decd/overlay2"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: build BASE NEW COMMAND")
	}
	if err := build(cmp.Or(os.Getenv("OVERLAY2_HOME"), "/var/tmp/overlay2-build"), os.Args[1], os.Args[2], os.Args[3]); err != nil {
		log.Fatal(err)
	}
}

func build(home, basePath, newPath, command string) (err error) {
	d, err := overlay2.New(home, overlay2.Options{})
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, d.Cleanup()) }()
	// One build at a time: the others wait.
	lock, err := os.Open(home)
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, lock.Close()) }()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	base, err := open(basePath)
	if err != nil {
		return err
	}
	parent, err := unpack(d, base)
	if err != nil {
		return err
	}

	const id = "build"
	if err := d.Remove(id); err != nil { // a build that was killed may have left it
		return err
	}
	if err := d.CreateReadWrite(id, parent, nil); err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, d.Remove(id)) }()
	if err := run(d, id, command); err != nil {
		return err
	}

	// Opened once for each digest and once to be written: the same layer gives the same bytes.
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return d.Diff(id, parent) })
	if err != nil {
		return err
	}
	img, err := mutate.AppendLayers(base, layer)
	if err != nil {
		return err
	}
	out, err := layout.Write(newPath, empty.Index)
	if err != nil {
		return err
	}
	return out.AppendImage(img)
}

// open returns the first image of an OCI layout.
func open(path string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(path)
	if err != nil {
		return nil, err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	if len(m.Manifests) == 0 {
		return nil, fmt.Errorf("%s: no image in it", path)
	}
	return index.Image(m.Manifests[0].Digest)
}

// unpack makes the layers of an image that are not there yet, side by side, and returns the uppermost.
func unpack(d *overlay2.Driver, img v1.Image) (top string, err error) {
	layers, err := img.Layers()
	if err != nil {
		return "", err
	}
	config, err := img.ConfigFile() // what layers should be; l.DiffID() would be what they are
	if err != nil {
		return "", err
	}
	if len(config.RootFS.DiffIDs) != len(layers) {
		return "", fmt.Errorf("the image has %d layers, its config says %d", len(layers), len(config.RootFS.DiffIDs))
	}
	var open []io.Closer
	defer func() {
		for _, r := range open {
			err = cmp.Or(err, r.Close())
		}
	}()
	ids := make([]string, len(layers))
	for i, diff := range config.RootFS.DiffIDs {
		// A layer is what it is over those below: the image specification's chain id.
		top = fmt.Sprintf("%x", sha256.Sum256([]byte(top+" "+diff.String())))
		ids[i] = top
	}
	whole, err := countWhole(d, ids)
	if err != nil {
		return "", err
	}
	// What a crash left is made again, or filled again where it is if layers of another image lie on it.
	for _, id := range slices.Backward(ids[whole:]) {
		if err := d.Remove(id); err != nil && !errors.Is(err, overlay2.ErrLayerInUse) {
			return "", err
		}
	}
	var missing []overlay2.LayerDiff
	below := ""
	for i, l := range layers {
		if i < whole {
			below = ids[i]
			continue
		}
		r, err := l.Uncompressed()
		if err != nil {
			return "", err
		}
		open = append(open, r)
		diff := &verifier{r, sha256.New(), config.RootFS.DiffIDs[i].Hex}
		if !d.Exists(ids[i]) {
			missing = append(missing, overlay2.LayerDiff{ID: ids[i], Diff: diff})
			continue
		}
		if _, err := d.ApplyDiff(ids[i], below, diff); err != nil {
			return "", err
		}
		below = ids[i]
	}
	_, err = d.ApplyLayers(below, missing)
	return top, err
}

// countWhole returns how many of the layers, from the lowest, are there with all their content. Exists alone does not tell: a
// layer that was being filled at a crash, or that a power cut took, is there and ErrIncomplete.
func countWhole(d *overlay2.Driver, ids []string) (int, error) {
	for i, id := range ids {
		f, err := d.Files(id)
		if errors.Is(err, overlay2.ErrLayerNotFound) || errors.Is(err, overlay2.ErrIncomplete) {
			return i, nil
		}
		if err != nil {
			return 0, err
		}
		if err := f.Close(); err != nil {
			return 0, err
		}
	}
	return len(ids), nil
}

// verifier fails at the end of a stream that has another digest, so that no layer comes of it.
type verifier struct {
	io.Reader
	hash hash.Hash
	want string
}

func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.Reader.Read(p)
	v.hash.Write(p[:n])
	if err == io.EOF {
		if got := hex.EncodeToString(v.hash.Sum(nil)); got != v.want {
			err = fmt.Errorf("the layer's digest is %s, not %s", got, v.want)
		}
	}
	return n, err
}

// run runs a command in the mounted layer.
func run(d *overlay2.Driver, id, command string) (err error) {
	root, err := d.Get(id, "")
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, d.Put(id)) }()
	c := exec.Command("/bin/sh", "-c", command)
	c.Dir, c.Stdout, c.Stderr = "/", os.Stdout, os.Stderr
	c.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	c.SysProcAttr = &syscall.SysProcAttr{ // of the child alone
		Chroot:     root, //nolint:forbidigo // so it changes nothing in this process
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC,
	}
	return c.Run()
}
