package archive

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func changeText(c []Change) string {
	var b strings.Builder
	for _, c := range c {
		fmt.Fprintln(&b, c)
	}
	return b.String()
}

// lowerMounted runs f with the merged view of layers, which are all lowers.
func lowerMounted(t *testing.T, base string, layers []string, opts string, f func(dir string)) {
	t.Helper()
	if len(layers) == 1 {
		f(layers[0])
		return
	}
	dir := filepath.Join(base, "parent")
	must(t, os.MkdirAll(dir, 0o755))
	data := "lowerdir=" + strings.Join(layers, ":")
	if opts != "" {
		data += "," + opts
	}
	must(t, unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY, data))
	defer func() { must(t, unix.Unmount(dir, 0)) }()
	f(dir)
}

// What Changes reads from the layers is what Compare finds between the mounts.
func TestChangesAreWhatTheKernelShows(t *testing.T) {
	for _, opts := range []string{"", "redirect_dir=on", "redirect_dir=on,metacopy=on", "userxattr"} {
		for seed := range uint64(30) {
			t.Run(fmt.Sprintf("%s/%d", opts, seed), func(t *testing.T) {
				depth := 2 + int(seed%3)
				layers, base := layerDirs(t, depth)
				r := rand.New(rand.NewPCG(seed, 2))
				scramble(t, r, layers[depth-1], 60)
				f := OverlayTrusted
				if opts == "userxattr" {
					f = OverlayUser
				}
				for top := depth - 2; top >= 0; top-- {
					var want []Change
					mounted(t, base, layers[top:], opts, func(dir string) {
						scramble(t, r, dir, 40)
						lowerMounted(t, base, layers[top+1:], opts, func(parent string) {
							var err error
							want, err = Compare(context.Background(), dir, parent)
							must(t, err)
						})
					})
					got, err := Changes(context.Background(), layers[top], ReadOptions{Format: f, Lowers: layers[top+1:]})
					must(t, err)
					if g, w := changeText(got), changeText(want); g != w {
						t.Errorf("layer %d: native:\n%s\nmounted:\n%s", top, g, w)
					}
				}
			})
		}
	}
}
