package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// twoImages is a layout of the images good:1 and bad:1, of which the second lacks its manifest.
func twoImages(t testing.TB) source {
	t.Helper()
	s := ociSource(t, image.CompressNone, someLayers(t), nil)
	var index v1.Index
	must(t, json.Unmarshal(s["index.json"], &index))
	good := index.Manifests[0]
	good.Annotations = map[string]string{v1.AnnotationRefName: "good:1"}
	bad := source{}.put(v1.MediaTypeImageManifest, []byte("{}"))
	bad.Annotations = map[string]string{v1.AnnotationRefName: "bad:1"}
	index.Manifests = []v1.Descriptor{bad, good}
	s["index.json"] = mustJSON(t, index)
	return s
}

// --ref needs nothing of the other images.
func TestRefAmongDamaged(t *testing.T) {
	docker := dockerWith(t, `{"rootfs":{"type":"layers","diff_ids":DIFFS}}`, "good:1", someLayers(t)...)
	var list []map[string]any
	must(t, json.Unmarshal(docker["manifest.json"], &list))
	docker["manifest.json"] = mustJSON(t, append([]map[string]any{{"Config": "lost", "RepoTags": []string{"bad:1"}, "Layers": []string{"lost"}}}, list...))
	both := twoImages(t)
	for name, b := range docker {
		both[name] = b
	}
	for form, s := range map[string]source{"oci": twoImages(t), "docker": docker, "docker-25": both} {
		o := newTool(t)
		if got := o.do("import", s.dir(t), "--ref", "good:1"); !strings.HasPrefix(got, "good:1 ") {
			t.Errorf("%s: %q", form, got)
		}
		o.fails(exitImage, "missing", "import", s.dir(t), "--ref", "bad:1")
		o.fails(exitImage, "missing", "import", s.dir(t))
		o.do("rm", "good:1")
		o.empty()
	}
}
