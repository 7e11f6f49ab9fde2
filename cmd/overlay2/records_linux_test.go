package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// dockerWith is an image in the form of docker save that has this config, in which DIFFS stands for the diff ids.
func dockerWith(t testing.TB, config, tag string, layers ...[]byte) source {
	t.Helper()
	var diffs []digest.Digest
	s, names := source{}, []string{}
	for _, l := range layers {
		diffs = append(diffs, digest.FromBytes(l))
		name := diffs[len(diffs)-1].Encoded() + ".tar"
		s[name], names = l, append(names, name)
	}
	s["config"] = bytes.Replace([]byte(config), []byte("DIFFS"), mustJSON(t, diffs), 1)
	s["manifest.json"] = mustJSON(t, []map[string]any{{"Config": "config", "RepoTags": []string{tag}, "Layers": names}})
	return s
}

// A config's bytes stay as they are when they are not UTF-8, too: the image's id is their digest.
func TestConfigOfAnyBytes(t *testing.T) {
	o := newTool(t)
	s := dockerWith(t, "{\"os\":\"linux\",\"architecture\":\"amd64\",\"author\":\"M\xfcller\",\"rootfs\":{\"type\":\"layers\",\"diff_ids\":DIFFS}}", "a:1", tarOf(t, "etc/", "", "etc/x", "x"))
	o.do("import", s.dir(t))
	var e exported
	dir := filepath.Join(t.TempDir(), "out")
	o.json(&e, "export", "a:1", "--to", dir)
	if want := digest.FromBytes(s["config"]).Encoded(); e.ID != want {
		t.Errorf("exported %s, imported %s", e.ID, want)
	}
	o.do("import", dir, "--name", "b:1")
	o.mount("box", "a:1")
	o.do("commit", "box", "--name", "c:1")
	o.json(&e, "export", "c:1", "--to", filepath.Join(t.TempDir(), "out"))
	var l listing
	o.json(&l, "ls")
	if len(l.Images) != 3 || l.Images[0].ID != l.Images[1].ID {
		t.Errorf("%+v", l.Images)
	}
	o.do("check")
	o.do("rm", "-f", "box")
	o.do("rm", "a:1", "b:1", "c:1")
	o.empty()
}

// A damaged record of an image is told, and can be removed; the others go on as before.
func TestDamagedImageRecord(t *testing.T) {
	for name, c := range map[string]struct {
		damage func([]byte) []byte
		layers bool // the record still says which layers it needs
	}{
		"digest":  {func(b []byte) []byte { return bytes.Replace(b, []byte("amd64"), []byte("amd\ufffd"), 1) }, true},
		"garbage": {func([]byte) []byte { return []byte("{{{") }, false},
		"empty":   {func([]byte) []byte { return nil }, false},
	} {
		t.Run(name, func(t *testing.T) {
			o := newTool(t)
			layers := someLayers(t)
			o.do("import", ociSource(t, "gzip", layers[:2], nil).dir(t), "--name", "good:1")
			o.do("import", ociSource(t, "gzip", layers, nil).dir(t), "--name", "bad:1")
			record := filepath.Join(o.root, "images", "bad:1.json")
			b, err := os.ReadFile(record)
			must(t, err)
			must(t, os.WriteFile(record, c.damage(b), 0o600))
			code, out, said := o.try("ls")
			if code != exitOK || !strings.Contains(out, "good:1") || !strings.Contains(said, "bad:1.json") {
				t.Errorf("ls: code %d, %s%s", code, out, said)
			}
			if code, out, _ := o.try("check"); code != exitFailure || !strings.Contains(out, "bad:1: damaged record") {
				t.Errorf("check: code %d: %s", code, out)
			}
			o.fails(exitFailure, "damaged record", "create", "box", "--from", "bad:1")
			o.do("import", ociSource(t, "gzip", layers[:1], nil).dir(t), "--name", "other:1")
			if c.layers {
				o.do("rm", "good:1") // its layers are the damaged one's, too
				o.do("rm", "bad:1")
				o.do("rm", "other:1")
			} else {
				var l listing
				code, _, _ := o.try("rm", "good:1")
				o.do("rm", "bad:1")
				if o.json(&l, "ls"); code != exitFailure || len(l.Layers) != 3 || len(l.Images) != 2 {
					t.Errorf("rm beside a record that does not tell its layers: code %d, %+v", code, l)
				}
				for _, s := range l.Layers {
					if s.DiffID == digest.FromBytes(layers[2]).String() {
						o.do("rm", s.ID)
					}
				}
				o.do("rm", "good:1", "other:1")
			}
			o.do("check")
			o.empty()
		})
	}
}
