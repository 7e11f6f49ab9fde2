package archive

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// unpackInto unpacks a tar into a new directory.
func unpackInto(t testing.TB, dir string, b []byte, opts UnpackOptions) Stats {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	stats, err := Unpack(context.Background(), dir, bytes.NewReader(b), opts)
	if err != nil {
		t.Fatal(err)
	}
	return stats
}

// A packed tree unpacks to the same tree, and that to the same tar.
func TestRoundTripBase(t *testing.T) {
	overlaytest.Require(t, "root")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		overlaytest.NoLeaks(t)
		from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
		overlaytest.Build(t, from, everything)
		b := packed(t, from, PackOptions{})
		stats := unpackInto(t, to, b, UnpackOptions{})
		overlaytest.Compare(t, overlaytest.Tree(t, from, overlaytest.NoRootTime), overlaytest.Tree(t, to, overlaytest.NoRootTime))
		if !bytes.Equal(packed(t, to, PackOptions{}), b) {
			t.Error("the unpacked tree gives another tar")
		}
		usage, err := Usage(context.Background(), from)
		must(t, err)
		if stats.Size != usage.Size {
			t.Errorf("Unpack counts %d bytes, Usage %d", stats.Size, usage.Size)
		}
	})
}

// A layer that was made through a mount goes through a tar, and over the same parent shows
// the same tree; its tar is the same again.
func TestRoundTripLayer(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	for _, mount := range [][]string{
		nil, {"redirect_dir=on"}, {"redirect_dir=on", "metacopy=on"}, {"userxattr"},
	} {
		t.Run(fmt.Sprint(mount), func(t *testing.T) {
			overlaytest.EachFS(t, func(t *testing.T, dir string) {
				overlaytest.NoLeaks(t)
				for seed := range uint64(3) {
					roundTripLayer(t, filepath.Join(dir, fmt.Sprint(seed)), seed, mount)
				}
			})
		})
	}
}

func roundTripLayer(t *testing.T, dir string, seed uint64, mount []string) {
	r := rand.New(rand.NewPCG(seed, 3))
	path := func(name string) string { return filepath.Join(dir, name) }
	format := OverlayTrusted
	if len(mount) == 1 && mount[0] == "userxattr" {
		format = OverlayUser
	}
	ignore := overlaytest.NoRootTime
	if len(mount) > 0 && mount[0] == "redirect_dir=on" {
		// A file in a renamed directory and one elsewhere, which stays in a lower layer, cannot be
		// links any more.
		ignore |= overlaytest.NoHardlinks
	}
	lowers := []string{path("low1"), path("low0")}
	overlaytest.Build(t, path("low0"), "dir a\nfile a/f \"1\"\ndir a/b\nfile a/b/g \"2\"\nfile h \"3\" user.x=\"1\"\nsymlink l -> a\ndir c\n file c/i size=100K")
	overlaytest.Random(t, r, path("low0"), 60)
	scramble(t, r, path("low0"), 30)
	o := overlaytest.Mount(t, lowers[1:], lowers[0], path("work0"), path("m"), mount...)
	overlaytest.Random(t, r, path("m"), 40)
	scramble(t, r, path("m"), 30)
	o.Unmount()

	// The layer itself.
	o = overlaytest.Mount(t, lowers, path("up"), path("work1"), path("m"), mount...)
	scramble(t, r, path("m"), 30)
	overlaytest.Random(t, r, path("m"), 60)
	o.Unmount()
	// Mounted again: an overlay may show two links as two files as long as it is mounted.
	o = overlaytest.Mount(t, lowers, path("up"), path("work1"), path("m"), mount...)
	want := overlaytest.Tree(t, path("m"), ignore)
	parent := overlaytest.Mount(t, append([]string{path("empty")}, lowers...), "", "", path("p"), mount...)
	compared, err := Compare(context.Background(), path("m"), path("p"))
	must(t, err)
	parent.Unmount()
	merged := packed(t, path("m"), PackOptions{Format: Merged, Changes: compared})
	o.Unmount()

	changes, err := Changes(context.Background(), path("up"), ReadOptions{Format: format, Lowers: lowers})
	must(t, err)
	if d := overlaytest.Diff(changeText(compared), changeText(changes)); d != "" {
		t.Errorf("seed %d: Compare and Changes differ:\n%s", seed, d)
	}
	unpackInto(t, path("up3"), merged, UnpackOptions{Format: format, Lowers: lowers})
	o = overlaytest.Mount(t, lowers, path("up3"), path("work3"), path("m"), mount...)
	got := overlaytest.Tree(t, path("m"), ignore|overlaytest.NoHardlinks)
	o.Unmount()
	if d := overlaytest.Diff(unlinked(want), got); d != "" {
		t.Errorf("seed %d: trees differ after a merged diff:\n%s", seed, d)
	}

	b := packed(t, path("up"), PackOptions{Format: format, Lowers: lowers})
	unpackInto(t, path("up2"), b, UnpackOptions{Format: format, Lowers: lowers})
	o = overlaytest.Mount(t, lowers, path("up2"), path("work2"), path("m"), mount...)
	got = overlaytest.Tree(t, path("m"), ignore)
	o.Unmount()
	if d := overlaytest.Diff(want, got); d != "" {
		t.Errorf("seed %d: mounted trees differ:\n%s", seed, d)
	}
	again := packed(t, path("up2"), PackOptions{Format: format, Lowers: lowers})
	if d := overlaytest.Diff(listed(t, b), listed(t, again)); d != "" || !bytes.Equal(b, again) {
		t.Errorf("seed %d: the unpacked layer gives another tar:\n%s", seed, d)
	}
}

// listed lists a tar, a line an entry.
func listed(t *testing.T, b []byte) string {
	t.Helper()
	var out bytes.Buffer
	for _, e := range entries(t, b) {
		fmt.Fprintln(&out, e)
	}
	return out.String()
}

// unlinked leaves the numbers of hard links out of a tree: a merged diff cannot keep links of
// changed files to unchanged ones.
func unlinked(tree string) string {
	return regexp.MustCompile(` link=\d+`).ReplaceAllString(tree, "")
}
