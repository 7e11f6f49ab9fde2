package overlaytest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestExtract: GNU tar's archive of a tree gives the tree.
func TestExtract(t *testing.T) {
	Require(t, "root", "mknod", "cmd:tar")
	EachFS(t, func(t *testing.T, dir string) {
		a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		Build(t, a, sample)
		file := filepath.Join(dir, "a.tar")
		cmd := exec.Command("tar", "-C", a, "--format=posix", "--xattrs", "--xattrs-include=*", "--sort=name", "-cf", file, ".")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("tar: %v: %s", err, out)
		}
		if err := os.Mkdir(b, 0o755); err != nil {
			t.Fatal(err)
		}
		Extract(t, file, b)
		Compare(t, Tree(t, a), Tree(t, b))
	})
}

// TestExtractHome: the homes in testdata are what a dockerd left: they hold marks, links and
// chains in its form.
func TestExtractHome(t *testing.T) {
	Require(t, "root", "mknod")
	homes, err := filepath.Glob("../../testdata/home/*.tar.gz")
	if err != nil || len(homes) == 0 {
		t.Fatalf("no homes: %v", err)
	}
	for _, home := range homes {
		EachFS(t, func(t *testing.T, dir string) {
			Extract(t, home, dir)
			links, err := os.ReadDir(filepath.Join(dir, "l"))
			if err != nil {
				t.Fatal(err)
			}
			for _, link := range links {
				id, err := filepath.EvalSymlinks(filepath.Join(dir, "l", link.Name()))
				if err != nil {
					t.Fatal(err)
				}
				got, err := os.ReadFile(filepath.Join(filepath.Dir(id), "link"))
				if err != nil || string(got) != link.Name() {
					t.Errorf("link of %s is %q, %v, want %q", id, got, err, link.Name())
				}
			}
			if len(links) != 8 {
				t.Errorf("%d layers, want 8", len(links))
			}
		})
	}
}
