package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"golang.org/x/sys/unix"
)

// The whole way: import, change, commit, export in every form, import again: the same image
// id, the same tree. Then nothing is left.
func TestLifeOfAnImage(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "base")
	box := o.mount("box", "base")
	change(t, box)
	o.do("commit", "box", "--name", "changed", "-m", "why", "-a", "who")
	var first exported
	for _, compress := range []string{"gzip", "zstd", "none"} {
		for _, to := range []string{"layout", "image.tar"} {
			to = filepath.Join(t.TempDir(), to)
			var e exported
			o.json(&e, "export", "changed", "--to", to, "--compress", compress)
			if len(e.Repacked) > 0 || len(e.Layers) != 6 {
				t.Errorf("%s %s: %+v", compress, to, e)
			}
			other := newTool(t)
			other.do("import", to)
			copied := other.mount("copy", "changed")
			same(t, box, copied)
			if first.ID == "" {
				first = e
			}
			if got := other.do("ls"); !strings.Contains(got, short(first.ID)) {
				t.Errorf("%s %s: another image id:\n%s", compress, to, got)
			}
			other.do("check")
			other.do("umount", "copy")
			other.do("rm", "copy", "changed")
			other.empty()
		}
	}
	o.do("check")
	o.do("umount", "box")
	o.do("rm", "box", "changed", "base")
	o.empty()
}

// What was imported comes out with the same digests, although the tars were packed by others.
func TestExportGivesTheSameLayers(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped)
	to := filepath.Join(t.TempDir(), "out")
	var e exported
	o.json(&e, "export", "overlay2/busybox:demo", "--to", to)
	var l listing
	o.json(&l, "ls")
	if e.ID != l.Images[0].ID || len(e.Repacked) > 0 {
		t.Errorf("%+v", e)
	}
	byID := map[string]string{}
	for _, s := range l.Layers {
		byID[s.ID] = s.DiffID
	}
	for i, id := range l.Images[0].Layers {
		if byID[id] != e.Layers[i] {
			t.Errorf("layer %d is %s, was %s", i, e.Layers[i], byID[id])
		}
	}
}

// A layer whose tar cannot be made again is packed anew, and the config fits it.
func TestExportPacksAnew(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "a")
	var l listing
	o.json(&l, "ls")
	for _, s := range l.Layers {
		must(t, os.Remove(filepath.Join(o.root, "layers", s.ID+".split.gz")))
	}
	to := filepath.Join(t.TempDir(), "out")
	code, _, said := o.try("export", "a", "--to", to)
	if code != exitOK || !strings.Contains(said, "packed anew") {
		t.Errorf("code %d, said %q", code, said)
	}
	other := newTool(t)
	other.do("import", to)
	same(t, o.mount("box", "a"), other.mount("box", "a"))
	o.do("umount", "box")
	other.do("umount", "box")
}

// A layer whose files are not those that were imported is not exported as if they were.
func TestExportOfDamage(t *testing.T) {
	for name, damage := range map[string]func(file, split string) error{
		"content":       func(file, _ string) error { return os.WriteFile(file, []byte("jello\n"), 0o600) },
		"gone":          func(file, _ string) error { return os.Remove(file) },
		"garbled split": func(_, split string) error { return os.Truncate(split, 50) },
	} {
		o := newTool(t)
		o.do("import", ociSource(t, "gzip", someLayers(t), nil).dir(t), "--name", "a")
		var l listing
		o.json(&l, "ls")
		id := l.Images[0].Layers[0]
		must(t, damage(filepath.Join(o.root, "overlay2", id, "diff/etc/motd"), filepath.Join(o.root, "layers", id+".split.gz")))
		to := filepath.Join(t.TempDir(), "out")
		o.fails(exitImage, "digest mismatch", "export", "a", "--to", to)
		if _, err := os.Stat(to); err == nil {
			t.Errorf("%s: it was exported", name)
		}
	}
}

// An odd tar is packed anew: an entry that a later one replaces, by another spelling of its name.
func TestExportOfOddTar(t *testing.T) {
	o := newTool(t)
	odd := [][]byte{tarOf(t, "etc/motd", "first", "/etc/motd", "second", "etc/gone", "x", "etc/.wh.gone", "")}
	o.do("import", ociSource(t, "gzip", odd, nil).dir(t), "--name", "a")
	to := filepath.Join(t.TempDir(), "out")
	if code, _, said := o.try("export", "a", "--to", to); code != exitOK || !strings.Contains(said, "packed anew") {
		t.Errorf("code %d, said %q", code, said)
	}
	o.do("import", to, "--name", "b")
	same(t, o.mount("box", "a"), o.mount("box2", "b"))
	o.do("rm", "-f", "box", "box2")
}

func TestExportIsReadByOthers(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "demo/app:v1")
	box := o.mount("box", "demo/app:v1")
	defer o.do("umount", "box")
	dir := filepath.Join(t.TempDir(), "layout")
	o.do("export", "demo/app:v1", "--to", dir)
	t.Run("go-containerregistry", func(t *testing.T) {
		index, err := layout.ImageIndexFromPath(dir)
		must(t, err)
		must(t, validate.Index(index))
	})
	t.Run("skopeo", func(t *testing.T) {
		overlaytest.Require(t, "cmd:skopeo")
		out, err := exec.Command("skopeo", "inspect", "oci:"+dir+":v1").CombinedOutput()
		if err != nil || !strings.Contains(string(out), `"Architecture": "amd64"`) {
			t.Errorf("%v: %s", err, out)
		}
		// And back: an archive in docker's first form that somebody else wrote.
		file := filepath.Join(t.TempDir(), "docker.tar")
		if out, err := exec.Command("skopeo", "copy", "oci:"+dir+":v1", "docker-archive:"+file+":other/name:v2").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		other := newTool(t)
		other.do("import", file)
		same(t, box, other.mount("box", "docker.io/other/name:v2"))
		other.do("umount", "box")
		// An exported archive has that form, too, for docker load.
		ours := filepath.Join(t.TempDir(), "ours.tar")
		o.do("export", "demo/app:v1", "--to", ours)
		if out, err := exec.Command("skopeo", "copy", "docker-archive:"+ours+":demo/app:v1", "oci:"+t.TempDir()).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("umoci", func(t *testing.T) {
		overlaytest.Require(t, "cmd:umoci")
		bundle := filepath.Join(t.TempDir(), "bundle")
		if out, err := exec.Command("umoci", "unpack", "--image", dir+":v1", bundle).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		same(t, box, filepath.Join(bundle, "rootfs"))
	})
}

// A root filesystem's tar, one layer, gives the tree that many layers gave.
func TestImportRootfs(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "a")
	box := o.mount("box", "a")
	r, err := archive.Pack(context.Background(), box, archive.PackOptions{Format: archive.Merged})
	must(t, err)
	defer r.Close()
	o.in = r
	o.do("import", "-", "--name", "flat")
	same(t, box, o.mount("flat", "flat"))
	o.do("umount", "flat")
	o.do("umount", "box")
}

// Containers over containers: what lies between becomes part of the new layer.
func TestCommitOverContainers(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "base")
	first := o.mount("first", "base")
	change(t, first)
	o.do("umount", "first")
	second := o.mount("second", "first")
	must(t, os.Remove(filepath.Join(second, "new/one")))
	must(t, os.WriteFile(filepath.Join(second, "etc/second"), nil, 0o600))
	o.do("commit", "second", "--name", "both")
	var l listing
	o.json(&l, "ls")
	for _, i := range l.Images {
		if i.Name == "both" && len(i.Layers) != 6 {
			t.Errorf("%d layers", len(i.Layers))
		}
	}
	same(t, second, o.mount("copy", "both"))
	for _, id := range []string{"second", "copy"} {
		o.do("umount", id)
	}
	o.do("rm", "copy", "second", "first", "both", "base")
	o.empty()
}

// A layer on top of nothing, from the first file on.
func TestCommitFromScratch(t *testing.T) {
	o := newTool(t)
	o.do("create", "new")
	dir := o.do("mount", "new")
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o4755))
	must(t, unix.Chmod(filepath.Join(dir, "file"), 0o4755))
	o.do("commit", "new", "--name", "scratch")
	same(t, dir, o.mount("copy", "scratch"))
	o.do("umount", "copy")
	o.do("rm", "copy", "new", "scratch")
	o.empty()
}

func TestChangesAndDiff(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "a")
	box := o.mount("box", "a")
	defer o.do("umount", "box")
	must(t, os.Remove(filepath.Join(box, "etc/group")))
	must(t, os.WriteFile(filepath.Join(box, "etc/\x1b[2Jevil\nname"), nil, 0o600))
	if got, want := o.do("changes", "box"), "C /etc\nA \"/etc/\\x1b[2Jevil\\nname\"\nD /etc/group"; got != want {
		t.Errorf("changes: %q", got)
	}
	if got, want := o.do("changes", "box", "--tree"), "/\n`-- C etc\n    |-- A \"\\x1b[2Jevil\\nname\"\n    `-- D group"; got != want {
		t.Errorf("tree: %q", got)
	}
	if got := o.do("changes", "box", "--parent", "box"); got != "" {
		t.Errorf("against itself: %q", got)
	}
	file := filepath.Join(t.TempDir(), "x.tar")
	o.do("diff", "box", "-o", file)
	b, err := os.ReadFile(file)
	must(t, err)
	if out := o.do("diff", "box"); out != strings.TrimSuffix(string(b), "\n") {
		t.Error("standard output and file differ")
	}
	other := newTool(t)
	other.do("import", file, "--type", "rootfs", "--name", "x") // it begins with no name that a root filesystem has
	o.fails(exitUsage, "standard output is the tar's", "--json", "diff", "box")
	o.fails(exitNotFound, "no such file", "diff", "box", "-o", "/nowhere/at/all")
}
