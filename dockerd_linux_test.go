package overlay2

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// TestDockerd: a real dockerd with its own overlay2 driver and this library use a home in turns. Each mounts, reads
// and changes what the other has written, and no image's digest changes.
func TestDockerd(t *testing.T) {
	s, before := newDockerdTest(t)
	s.checkForeign() // while it runs
	s.Stop()

	d := s.open()
	s.compare(d, before)
	s.addLayers(d)
	s.moveImages(d)
	s.close(d)

	s.Start("--storage-driver", "overlay2")
	if after := s.look(); !sameLook(before, after) {
		t.Errorf("dockerd sees\n%s\nbefore it was\n%s", after.text(), before.text())
	}
	// Docker runs, changes, commits and builds on layers of ours.
	if got := s.Docker("run", "--rm", "--network", "none", "built:1", "cat", "/built", "/etc/new"); got != "built\nnow a file" {
		t.Errorf("a container on our layers has %q", got)
	}
	if got := s.Docker("start", "-a", "box"); got != "again" {
		t.Errorf("the old container says %q", got)
	}
	s.makeBox("second", "built:1")
	s.Docker("commit", "second", "committed:1")
	s.build("again:1", "FROM committed:1\nRUN echo more >/more\n")
	after := s.look()
	s.Stop()

	d = s.open()
	s.compare(d, after)
	s.close(d)

	// Docker removes layers of ours, and lets those alone that it does not know.
	s.Start("--storage-driver", "overlay2")
	s.Docker("rm", "-f", "box", "second")
	s.Docker("rmi", "again:1", "committed:1", "built:1", "home:1")
	s.Stop()
	d = s.open()
	if path, err := d.Get("ours-rw", ""); err != nil {
		t.Error(err)
	} else {
		if data, err := os.ReadFile(path + "/ours"); err != nil || string(data) != "ours\n" {
			t.Errorf("%q %v", data, err)
		}
		must(t, d.Put("ours-rw"))
	}
	s.close(d)
}

// TestDockerdKilled: what a killed dockerd leaves opens here; Check says what is wrong, and Repair mends it.
func TestDockerdKilled(t *testing.T) {
	s, before := newDockerdTest(t)
	s.Kill()
	box := before.layers["box"]
	// As a crash of the machine leaves it: a mount point, and files that are empty. Half a layer.
	must(t, os.MkdirAll(s.home+"/"+box+"/merged", 0o700))
	must(t, os.Truncate(s.home+"/"+box+"/link", 0))
	must(t, os.Truncate(s.home+"/"+before.layers["home:1"]+"/lower", 0))
	must(t, os.Mkdir(s.home+"/"+strings.Repeat("0", 64), 0o710))
	foreign, err := CheckHome(s.home)
	must(t, err)
	d, err := New(s.home, quietOptions(DurabilityBackground))
	must(t, err)
	actions, err := d.Repair(RepairOpts{RemoveOrphans: true})
	must(t, err)
	t.Logf("found %v\ndone %v", foreign, actions)
	if len(foreign) < 4 || len(actions) < 4 {
		t.Errorf("found %v, done %v", foreign, actions)
	}
	s.compare(d, before)
	s.close(d)
	s.Start("--storage-driver", "overlay2")
	if after := s.look(); !sameLook(before, after) {
		t.Errorf("dockerd sees\n%s\nbefore it was\n%s", after.text(), before.text())
	}
	if got := s.Docker("start", "-a", "box"); got != "again" {
		t.Errorf("the container says %q", got)
	}
	s.Docker("rm", "-f", "box")
	s.Docker("rmi", "built:1", "home:1")
}

type dockerdTest struct {
	*testing.T
	*overlaytest.Dockerd
	home string
}

// newDockerdTest starts a dockerd with images and a container, and returns what it says of them.
func newDockerdTest(t *testing.T) (*dockerdTest, look) {
	t.Helper()
	overlaytest.Require(t, "root", "overlay", "mknod", "dockerd")
	overlaytest.NoLeaks(t)
	s := &dockerdTest{T: t, Dockerd: overlaytest.NewDockerd(t, overlaytest.MountFS(t, overlaytest.FS{Name: "ext4"}))}
	s.home = filepath.Join(s.Data, "overlay2")
	s.Start("--storage-driver", "overlay2")
	s.makeImages()
	s.makeBox("box", "built:1")
	before := s.look()
	return s, before
}

// look is what dockerd says of its images and containers.
type look struct {
	digests map[string]string // of docker save, by image
	ids     map[string]string
	layers  map[string]string // top layer, by image and container
	diffs   map[string]string // docker diff, by container
	trees   map[string]string // docker export, by container
}

func (l look) text() string {
	return fmt.Sprintf("ids %v\ndigests %v\ndiffs %v\ntrees %v", l.ids, l.digests, l.diffs, l.trees)
}

// sameLook says whether all is the same but for the ids of layers.
func sameLook(a, b look) bool {
	a.layers, b.layers = nil, nil
	return a.text() == b.text()
}

func (s *dockerdTest) look() look {
	s.Helper()
	l := look{map[string]string{}, map[string]string{}, map[string]string{}, map[string]string{}, map[string]string{}}
	upper := func(kind, name string) string {
		return filepath.Base(filepath.Dir(s.Docker(kind, "inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", name)))
	}
	for _, name := range strings.Fields(s.Docker("images", "--format", "{{.Repository}}:{{.Tag}}")) {
		saved, err := s.Try(nil, "save", name)
		must(s, err)
		l.digests[name] = savedLayers(s, saved)
		l.ids[name] = s.Docker("image", "inspect", "-f", "{{.Id}}", name)
		l.layers[name] = upper("image", name)
	}
	for _, name := range strings.Fields(s.Docker("ps", "-a", "--format", "{{.Names}}")) {
		l.layers[name] = upper("container", name)
		lines := strings.Split(s.Docker("diff", name), "\n")
		slices.SortFunc(lines, func(a, b string) int { return strings.Compare(a[2:], b[2:]) })
		l.diffs[name] = strings.Join(lines, "\n")
		exported, err := s.Try(nil, "export", name)
		must(s, err)
		dir := filepath.Join(s.TempDir(), "export")
		must(s, os.Mkdir(dir, 0o755))
		_, err = archive.Unpack(context.Background(), dir, bytes.NewReader(exported), archive.UnpackOptions{Format: archive.Merged})
		must(s, err)
		l.trees[name] = dockerTree(s, dir)
	}
	return l
}

// savedLayers returns the digests of the layers in the output of docker save.
func savedLayers(s *dockerdTest, saved []byte) string {
	s.Helper()
	var sums []string
	for r := tar.NewReader(bytes.NewReader(saved)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(s, err)
		if strings.HasSuffix(h.Name, "layer.tar") && h.Typeflag == tar.TypeReg {
			sum := sha256.New()
			_, err := io.Copy(sum, r)
			must(s, err)
			sums = append(sums, fmt.Sprintf("%x", sum.Sum(nil)))
		}
	}
	slices.Sort(sums)
	return strings.Join(sums, " ")
}

// dockerTree is what docker export keeps of a tree: it has neither most xattrs nor parts of seconds, and
// the root is not in it.
func dockerTree(t testing.TB, dir string) string {
	return overlaytest.Tree(t, dir, overlaytest.NoXattrs, overlaytest.NoTimes, overlaytest.NoRoot)
}

// makeImages loads an image of three layers, and builds one on it.
func (s *dockerdTest) makeImages() {
	s.Helper()
	run := file("bin/busybox", busybox(s))
	run.Mode = 0o755
	layers := [][]byte{
		makeTar(s, file("bin/", ""), run, tarEntry{tar.Header{Name: "bin/sh", Typeflag: tar.TypeSymlink, Linkname: "busybox"}, ""},
			tarEntry{tar.Header{Name: "bin/cat", Typeflag: tar.TypeSymlink, Linkname: "busybox"}, ""},
			tarEntry{tar.Header{Name: "bin/rm", Typeflag: tar.TypeSymlink, Linkname: "busybox"}, ""},
			file("etc/", ""), file("etc/gone", "gone\n"), file("etc/changed", "one\n"), file("var/", ""), file("var/cache/", ""), file("var/cache/old", "old\n"),
			tarEntry{tar.Header{Name: "etc/suid", Mode: 0o4755}, "s"}, tarEntry{tar.Header{Name: "etc/same", Typeflag: tar.TypeLink, Linkname: "etc/suid", Mode: 0o4755}, ""},
			tarEntry{tar.Header{Name: "etc/owned", Uid: 5, Gid: 6}, "o"}, tarEntry{tar.Header{Name: "etc/pipe", Typeflag: tar.TypeFifo}, ""},
			tarEntry{tar.Header{Name: "etc/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, ""}),
		makeTar(s, file("etc/", ""), file("etc/.wh.gone", ""), file("etc/changed", "two\n"), file("etc/new/", ""), file("var/cache/", ""), file("var/cache/.wh..wh..opq", ""), file("var/cache/fresh", "fresh\n")),
		makeTar(s, file("etc/", ""), file("etc/new", "now a file\n")),
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(name string, data []byte) {
		must(s, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}))
		_, err := w.Write(data)
		must(s, err)
	}
	names, ids := []string{}, []string{}
	for i, data := range layers {
		names, ids = append(names, fmt.Sprintf("%d/layer.tar", i)), append(ids, fmt.Sprintf("sha256:%x", sha256.Sum256(data)))
		add(names[i], data)
	}
	config, err := json.Marshal(map[string]any{"architecture": "amd64", "os": "linux", "config": map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": []string{"/bin/sh"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids}, "history": []map[string]any{{}, {}, {}}})
	must(s, err)
	add("config.json", config)
	manifest, err := json.Marshal([]map[string]any{{"Config": "config.json", "RepoTags": []string{"home:1"}, "Layers": names}})
	must(s, err)
	add("manifest.json", manifest)
	must(s, w.Close())
	if out, err := s.Try(b.Bytes(), "load"); err != nil {
		s.Fatalf("load: %v: %s", err, out)
	}
	s.build("built:1", "FROM home:1\nRUN echo built >/built\nRUN rm /etc/changed\n")
}

// build builds an image from a Dockerfile.
func (s *dockerdTest) build(name, dockerfile string) {
	s.Helper()
	if out, err := s.Try([]byte(dockerfile), "build", "--network", "none", "--pull=false", "-t", name, "-"); err != nil {
		s.Fatalf("build: %v: %s", err, out)
	}
}

// makeBox makes a container that has changed something, and says "again" when it is started again.
func (s *dockerdTest) makeBox(name, image string) {
	s.Helper()
	s.Docker("run", "--name", name, "--network", "none", image, "sh", "-c",
		"if [ -e /once ]; then echo again; else echo once >/once; rm /etc/owned; echo more >>/etc/suid; fi")
}

// busybox returns a program that runs without libraries, from the image of the demo.
func busybox(t testing.TB) string {
	t.Helper()
	f, err := os.Open("testdata/image/busybox.tar")
	must(t, err)
	defer f.Close()
	for image := tar.NewReader(f); ; {
		_, err := image.Next()
		must(t, err)
		z, err := gzip.NewReader(image)
		if err != nil {
			continue
		}
		for layer := tar.NewReader(z); ; {
			h, err := layer.Next()
			if err != nil {
				break
			}
			if h.Typeflag == tar.TypeReg && h.Size > 1<<20 {
				data, err := io.ReadAll(layer)
				must(t, err)
				return string(data)
			}
		}
	}
}

// checkForeign looks at the home without a Driver: it is in order, and stays as it is.
func (s *dockerdTest) checkForeign() {
	s.Helper()
	before := overlaytest.Tree(s, s.home, overlaytest.NoXattrs)
	problems, err := CheckHome(s.home)
	if err != nil || len(problems) > 0 {
		s.Errorf("CheckHome: %v %v", problems, err)
	}
	if after := overlaytest.Tree(s, s.home, overlaytest.NoXattrs); after != before {
		s.Errorf("CheckHome changed\n%s", overlaytest.Diff(before, after))
	}
}

func (s *dockerdTest) open() *Driver {
	s.Helper()
	s.checkForeign()
	d, err := New(s.home, Options{})
	must(s, err)
	checkEmpty(s.T, d)
	return d
}

func (s *dockerdTest) close(d *Driver) {
	s.Helper()
	must(s, d.Cleanup())
	checkEmpty(s.T, d)
}

// compare looks at all layers here: what dockerd said of them is so.
func (s *dockerdTest) compare(d *Driver, docker look) {
	s.Helper()
	for name, id := range docker.layers {
		path, err := d.Get(id, "")
		must(s, err)
		if want, ok := docker.trees[name]; ok {
			overlaytest.Compare(s, want, dockerTree(s, path))
		}
		must(s, d.Put(id))
		if want, ok := docker.diffs[name]; ok {
			changes, err := d.Changes(id, id+"-init")
			must(s, err)
			var lines []string
			for _, c := range changes {
				lines = append(lines, c.String())
			}
			overlaytest.Compare(s, want, strings.Join(lines, "\n"))
		}
	}
	for _, id := range homeNames(s, d) {
		if id == "backingFsBlockDev" {
			continue
		}
		if data := readDiff(s, d, id, s.parent(id)); len(data) == 0 {
			s.Errorf("layer %s has an empty diff", id)
		}
	}
	checkEmpty(s.T, d)
}

// parent returns the parent of a layer, by its files.
func (s *dockerdTest) parent(id string) string {
	s.Helper()
	data, err := os.ReadFile(filepath.Join(s.home, id, "lower"))
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	must(s, err)
	first, _, _ := strings.Cut(string(data), ":")
	target, err := os.Readlink(filepath.Join(s.home, first))
	must(s, err)
	return filepath.Base(filepath.Dir(target))
}

// addLayers makes layers that dockerd does not know, one on one of its own.
func (s *dockerdTest) addLayers(d *Driver) {
	s.Helper()
	apply(s, d, "ours-base", "", makeTar(s, file("etc/", ""), file("etc/base", "base")))
	apply(s, d, "ours", "ours-base", makeTar(s, file("etc/.wh.base", "")))
	must(s, d.CreateReadWrite("ours-rw", "ours", nil))
	fill(s, d, "ours-rw", `file ours "ours\n"`)
}

// moveImages makes each layer of an image anew by this library, from its diff, and tells dockerd's
// database: from now on its images are made of layers of ours.
func (s *dockerdTest) moveImages(d *Driver) {
	s.Helper()
	files, err := filepath.Glob(filepath.Join(s.Data, "image/overlay2/layerdb/sha256/*/cache-id"))
	must(s, err)
	moved := map[string]string{"": ""}
	old := map[string]string{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		must(s, err)
		old[string(data)] = f
	}
	if len(old) < 4 {
		s.Fatalf("layers of images: %v", old)
	}
	var move func(id string)
	move = func(id string) {
		if _, done := moved[id]; done {
			return
		}
		parent := s.parent(id)
		move(parent)
		moved[id] = fmt.Sprintf("%x", sha256.Sum256([]byte(id)))
		apply(s, d, moved[id], moved[parent], readDiff(s, d, id, parent))
		must(s, os.WriteFile(old[id], []byte(moved[id]), 0o600))
	}
	for id := range old {
		move(id)
	}
}
