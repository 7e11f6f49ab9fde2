package main

import (
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
	"github.com/opencontainers/go-digest"
)

// A layer that is there is taken for the one of an image only if it is that: the id of a base layer, its diff id, can be another's id over
// the layers below it.
func TestLayerOfAnotherKind(t *testing.T) {
	o := newTool(t)
	config := `{"os":"linux","rootfs":{"type":"layers","diff_ids":DIFFS}}`
	a, b := tarOf(t, "etc/", "", "etc/a", "a"), tarOf(t, "etc/", "", "etc/b", "b")
	good := dockerWith(t, config, "good:1", a, b)
	o.do("import", good.dir(t))
	evil := dockerWith(t, config, "evil:1", []byte("no tar"))
	id := image.ChainID(digest.FromBytes(a), digest.FromBytes(b))
	evil["config"] = []byte(strings.Replace(config, "DIFFS", `["`+id.String()+`"]`, 1))
	o.fails(exitImage, "invalid image", "import", evil.dir(t))
	o.do("import", good.dir(t))
	o.do("check")
	o.do("rm", "good:1")
	o.empty()
}
