package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// cutPower leaves the layers as the driver does when power was cut before they were on the disk: see docs/format.md.
func (o *tool) cutPower(ids ...string) {
	o.t.Helper()
	home := filepath.Join(o.root, "overlay2")
	for _, id := range ids {
		must(o.t, os.Symlink("empty", filepath.Join(home, id, "incomplete")))
		link, err := os.ReadFile(filepath.Join(home, id, "link"))
		must(o.t, err)
		at := filepath.Join(home, "l", string(link))
		must(o.t, os.Remove(at))
		must(o.t, os.Symlink("../"+id+"/incomplete", at))
	}
}

// What was lost by a power cut is unpacked again by an import of the same image, in its place: the layers have layers above them.
func TestImportAfterPowerCut(t *testing.T) {
	for name, lost := range map[string]struct {
		layers []int
		record int // whose record was lost too, -1 for none
	}{
		"all": {[]int{0, 1, 2, 3, 4}, -1}, "one in the middle": {[]int{2}, -1}, "without the last": {[]int{0, 1, 2, 3}, 4}, "an empty record": {[]int{1}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			o := newTool(t)
			o.do("import", shipped, "--name", "a")
			good := newTool(t)
			good.do("import", shipped, "--name", "a")
			var l listing
			o.json(&l, "ls")
			layers := l.Images[0].Layers
			if len(layers) != 5 {
				t.Fatalf("%d layers", len(layers))
			}
			o.do("create", "box", "--from", layers[3])
			var ids []string
			for _, i := range lost.layers {
				ids = append(ids, layers[i])
			}
			if lost.record == 4 { // the driver lost it as well
				must(t, os.RemoveAll(filepath.Join(o.root, "images")))
				must(t, os.Mkdir(filepath.Join(o.root, "images"), 0o700))
				o.do("rm", layers[4])
			} else if lost.record >= 0 {
				must(t, os.Truncate(filepath.Join(o.root, "layers", layers[lost.record]+".json"), 0))
			}
			o.cutPower(ids...)
			if code, out, _ := o.try("check"); code != exitFailure {
				t.Errorf("check: code %d: %s", code, out)
			}
			var r struct{ Images []imported }
			o.json(&r, "import", shipped, "--name", "a")
			for i, l := range r.Images[0].Layers {
				if want := slices.Contains(lost.layers, i) || i == lost.record; l.New != want {
					t.Errorf("layer %d: new is %v", i, l.New)
				}
			}
			o.do("check")
			same(t, good.mount("box", "a"), o.mount("again", "a"))
			good.do("umount", "box")
			var e exported
			o.json(&e, "export", "a", "--to", filepath.Join(t.TempDir(), "out"))
			if len(e.Repacked) > 0 {
				t.Errorf("packed anew: %v", e.Repacked)
			}
			o.do("mount", "box")
			o.do("rm", "-f", "box", "again")
			o.do("rm", "a")
			o.empty()
		})
	}
}

// A layer that cannot be unpacked again stays as it was, unfinished: others lie on it.
func TestImportAfterPowerCutFails(t *testing.T) {
	o := newTool(t)
	layers := someLayers(t)
	s := dockerSource(t, "none", layers)
	o.do("import", s.dir(t), "--name", "a")
	var l listing
	o.json(&l, "ls")
	o.cutPower(l.Images[0].Layers[0])
	s["0000000000000000000000000000000000000000000000000000000000000000/layer.tar"] = tarOf(t, "etc/evil", "")
	o.fails(exitImage, "digest mismatch", "import", s.dir(t), "--name", "a")
	o.fails(exitFailure, "incomplete", "export", "a", "--to", filepath.Join(t.TempDir(), "out"))
	o.do("import", dockerSource(t, "none", layers).dir(t), "--name", "a")
	o.do("check")
	o.do("rm", "a")
	o.empty()
}
