package overlaytest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const randomLower = `
file a "lower a"
file d/b "lower b" user.x0="1"
file d/e/f 0755 size=100K data=5000:"x"
file h1 "linked"
link h2 -> h1
symlink s -> d/b
char n 1:3
dir empty 0700 uid=5 gid=6
fifo p
`

// TestRandomOverlay: the same operations in a mounted overlay and in a plain directory
// end in the same tree, so that a difference that a test finds is the driver's.
func TestRandomOverlay(t *testing.T) {
	NoLeaks(t)
	EachFS(t, func(t *testing.T, dir string) {
		for seed := range uint64(4) {
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				at := func(name string) string { return filepath.Join(dir, fmt.Sprint(seed), name) }
				Build(t, at("lower"), randomLower)
				Build(t, at("plain"), randomLower)
				options := []string{"redirect_dir=off"}
				if seed%2 == 1 {
					options = []string{"redirect_dir=on"}
				}
				o := Mount(t, []string{at("lower")}, at("upper"), at("work"), at("merged"), options...)
				ops := Random(t, rand.New(rand.NewPCG(seed, 1)), o.Merged, 300, OddNames)
				Apply(t, at("plain"), ops)
				Compare(t, Tree(t, at("plain"), NoRootTime, NoOverlayXattrs), Tree(t, o.Merged, NoRootTime))
			})
		}
	})
}

func TestRandomDeterministic(t *testing.T) {
	Require(t, "root", "mknod")
	var trees, logs [2]string
	for i := range trees {
		dir := t.TempDir()
		Build(t, dir, randomLower)
		var log strings.Builder
		for _, op := range Random(t, rand.New(rand.NewPCG(7, 7)), dir, 500, OddNames) {
			fmt.Fprintln(&log, op)
		}
		trees[i], logs[i] = Tree(t, dir), log.String()
	}
	Compare(t, logs[0], logs[1])
	Compare(t, trees[0], trees[1])
	for _, v := range verbs {
		if v.verb != "replace" && !strings.Contains(logs[0], v.verb+" ") {
			t.Errorf("500 steps never did %s", v.verb)
		}
	}
}

func TestRandomOptions(t *testing.T) {
	dir := t.TempDir()
	ops := Random(t, rand.New(rand.NewPCG(1, 2)), dir, 500, NoDevices, NoRandomXattrs, NoRandomHardlinks, NoRandomOwners, NoDirRename)
	for _, op := range ops {
		switch op.Verb {
		case "mknod", "setxattr", "removexattr", "link", "chown":
			t.Errorf("did %s", op)
		}
	}
	if _, err := os.Stat(dir); err != nil {
		t.Error(err)
	}
}

func TestCopyTree(t *testing.T) {
	Require(t, "root", "mknod")
	dir := t.TempDir()
	Build(t, filepath.Join(dir, "a"), randomLower)
	CopyTree(t, filepath.Join(dir, "a"), filepath.Join(dir, "b"))
	Compare(t, Tree(t, filepath.Join(dir, "a"), NoHardlinks), Tree(t, filepath.Join(dir, "b")))
}
