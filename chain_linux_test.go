package overlay2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// TestDifferentialChain takes a whole chain through Diff and ApplyDiff. Each round does random
// operations in a layer over those before it and in a plain directory, and applies its
// diff to a layer over the copies of those before: both chains, mounted, and the plain
// directory must be one tree, whatever marks of lower layers the marks of upper ones meet.
// The copy must give the same diff, and Changes must tell what comparing the mounted trees tells.
func TestDifferentialChain(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	for _, options := range [][]string{nil, {"redirect_dir=on"}, {"redirect_dir=on", "metacopy=on"}} {
		t.Run(strings.Join(options, ","), func(t *testing.T) {
			overlaytest.EachFS(t, func(t *testing.T, dir string) {
				for seed := range uint64(2) {
					t.Run(fmt.Sprint(seed), func(t *testing.T) {
						c := chainTest{seed: seed, dir: filepath.Join(dir, fmt.Sprint(seed))}
						c.d = newTestDriver(t, filepath.Join(c.dir, "home"), Options{MountOptions: options})
						c.run(t, len(options) == 0)
					})
				}
			})
		})
	}
}

type chainTest struct {
	d    *Driver
	seed uint64
	dir  string
}

// run grows both chains. The diff of the copy is the same if exact: where directories were
// renamed or only metadata was copied up, the copy holds more than the original.
func (c *chainTest) run(t *testing.T, exact bool) {
	r := rand.New(rand.NewPCG(c.seed, 3))
	plain := filepath.Join(c.dir, "plain")
	overlaytest.Build(t, plain, "")
	parent, copyParent := "", ""
	for round := range 4 {
		id, copyID := fmt.Sprintf("layer%d", round), fmt.Sprintf("copy%d", round)
		must(t, c.d.CreateReadWrite(id, parent, nil))
		root, put := get(t, c.d, id)
		overlaytest.Apply(t, plain, overlaytest.Random(t, r, root, 150, overlaytest.OddNames))
		put()
		want := overlaytest.Tree(t, plain, overlaytest.NoRootTime)
		overlaytest.Compare(t, want, tree(t, c.d, id, overlaytest.NoRootTime))

		diff := readDiff(t, c.d, id, parent)
		must(t, c.d.Create(copyID, copyParent, nil))
		size, err := c.d.ApplyDiff(copyID, copyParent, bytes.NewReader(diff))
		must(t, err)
		if got, err := c.d.DiffSize(copyID, copyParent); err != nil || got != size {
			t.Errorf("round %d: DiffSize = %d, %v, ApplyDiff said %d", round, got, err, size)
		}
		overlaytest.Compare(t, want, tree(t, c.d, copyID, overlaytest.NoRootTime))
		if again := readDiff(t, c.d, copyID, copyParent); exact && !bytes.Equal(diff, again) {
			t.Errorf("round %d: the copy's diff has other bytes", round)
			overlaytest.Compare(t, strings.Join(tarNames(t, diff), "\n"), strings.Join(tarNames(t, again), "\n"))
		}
		if parent != "" {
			wantSameChanges(t, c.d, id, parent)
			wantSameChanges(t, c.d, copyID, copyParent)
		}
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
		parent, copyParent = id, copyID
	}
}
