package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2"
)

// imported imports the shipped image as "a" and returns its layers, the base first.
func (o *tool) imported() []string {
	o.t.Helper()
	var r struct{ Images []imported }
	o.json(&r, "import", shipped, "--name", "a")
	var ids []string
	for _, l := range r.Images[0].Layers {
		ids = append(ids, l.ID)
	}
	return ids
}

// whole checks that the image "a" and its layers are as they were.
func (o *tool) whole(layers []string) {
	o.t.Helper()
	var l listing
	if o.json(&l, "ls"); len(l.Images) != 1 || len(l.Layers) != len(layers) {
		o.t.Errorf("%d images, %d layers of %d", len(l.Images), len(l.Layers), len(layers))
	}
	o.do("export", "a", "--to", filepath.Join(o.t.TempDir(), "out"))
	o.do("check")
}

// An image of which a layer is mounted is not removed, nor is another given its name; with -f it is unmounted.
func TestRemoveMountedImage(t *testing.T) {
	o := newTool(t)
	layers := o.imported()
	other := ociSource(t, "gzip", someLayers(t), nil).dir(t)
	for _, id := range []string{layers[0], layers[4]} {
		at := filepath.Join(filepath.Dir(o.root), "at")
		must(t, os.MkdirAll(at, 0o755))
		o.do("mount", id, at)
		o.fails(exitConflict, "it is mounted", "rm", "a")
		o.fails(exitConflict, "it is mounted", "import", other, "--name", "a", "--replace")
		o.whole(layers)
		if entries, err := os.ReadDir(at); err != nil || len(entries) == 0 {
			t.Errorf("%v, %v", entries, err)
		}
		if id == layers[0] {
			o.do("umount", id)
			continue
		}
		o.do("rm", "-f", "a")
		if entries, err := os.ReadDir(at); err != nil || len(entries) > 0 {
			t.Errorf("still mounted: %v, %v", entries, err)
		}
	}
	o.do("check")
	o.empty()
}

// An image of which others read a layer keeps all its layers and its name.
func TestRemoveImageThatIsRead(t *testing.T) {
	o := newTool(t)
	layers := o.imported()
	other := ociSource(t, "gzip", someLayers(t), nil).dir(t)
	d, err := overlay2.New(filepath.Join(o.root, "overlay2"), overlay2.Options{})
	must(t, err)
	for _, id := range []string{layers[0], layers[4]} {
		r, err := d.Diff(id, "")
		must(t, err)
		o.fails(exitConflict, "is in use", "rm", "a")
		o.fails(exitConflict, "is in use", "rm", "-f", "a")
		o.fails(exitConflict, "is in use", "import", other, "--name", "a", "--replace")
		o.whole(layers)
		must(t, r.Close())
	}
	must(t, d.Cleanup())
	o.do("rm", "a")
	o.empty()
}

// Layers that a crash left without an image are listed, and go by rm.
func TestCheckListsUnneededLayers(t *testing.T) {
	o := newTool(t)
	layers := o.imported()
	o.do("create", "box", "--from", layers[1])
	must(t, os.Remove(filepath.Join(o.root, "images", "a.json")))
	code, out, _ := o.try("check")
	if code != exitFailure || strings.Count(out, ": nothing needs it") != 3 || strings.Contains(out, layers[1]) {
		t.Errorf("code %d: %s", code, out)
	}
	o.do("rm", layers[4], layers[3], layers[2])
	o.do("check")
	o.do("rm", "box", layers[1], layers[0])
	o.empty()
}

// A name that is a layer's, too, is the image's only if it is the whole of it; "latest" is added to what names nothing else.
func TestNameOfImageAndLayer(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "web:latest")
	o.do("create", "web", "--from", "web")
	o.do("create", "above", "--from", "web")
	var l listing
	o.json(&l, "ls")
	for _, s := range l.Layers {
		if s.ID == "above" && s.Parent != "web" {
			t.Errorf("it lies on %s", s.Parent)
		}
	}
	o.do("rm", "above")
	o.do("rm", "web")
	if o.json(&l, "ls"); len(l.Images) != 1 || len(l.Layers) != 5 {
		t.Errorf("%d images, %d layers", len(l.Images), len(l.Layers))
	}
	o.do("import", shipped, "--name", "db")
	o.do("create", "box", "--from", "web") // the image: there is no layer
	o.do("rm", "web")
	o.fails(exitConflict, "in use by layer box", "rm", "db")
	o.do("rm", "box", "db")
	o.empty()
}
