package overlay2

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// dockerHome is what the record beside a home in testdata says of it.
type dockerHome struct {
	layers map[string]string   // of images and containers: name to layer id
	diffs  map[string][]string // of containers: name to what docker diff printed
}

func readDockerHome(t *testing.T, file string) dockerHome {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := dockerHome{layers: make(map[string]string), diffs: make(map[string][]string)}
	for s := bufio.NewScanner(f); s.Scan(); {
		switch words := strings.Fields(s.Text()); {
		case words[0] == "#":
		case len(words) == 2:
			h.layers[words[0]] = words[1]
		case len(words) == 3:
			h.diffs[words[0]] = append(h.diffs[words[0]], words[1]+" "+words[2])
		default:
			t.Fatalf("%s: %q", file, s.Text())
		}
	}
	if len(h.layers) == 0 || len(h.diffs) == 0 {
		t.Fatalf("%s says nothing", file)
	}
	return h
}

// TestDockerHome: a home that a real dockerd wrote opens here, has no problems, mounts what
// its files say, has the changes that docker diff printed, and grows and shrinks.
func TestDockerHome(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	overlaytest.NoLeaks(t)
	tars, err := filepath.Glob("testdata/home/*.tar.gz")
	if err != nil || len(tars) == 0 {
		t.Fatalf("no homes in testdata: %v", err)
	}
	for _, tar := range tars {
		overlaytest.EachFS(t, func(t *testing.T, dir string) {
			home := filepath.Join(dir, "overlay2")
			if err := os.Mkdir(home, 0o710); err != nil {
				t.Fatal(err)
			}
			overlaytest.Extract(t, tar, home)
			useDockerHome(t, home, readDockerHome(t, strings.TrimSuffix(tar, ".tar.gz")+".txt"))
		})
	}
}

func useDockerHome(t *testing.T, home string, docker dockerHome) {
	before := overlaytest.Tree(t, home)
	d, err := New(home, Options{})
	if err != nil {
		t.Fatal(err)
	}
	problems, err := d.Check()
	if err != nil || len(problems) > 0 {
		t.Errorf("Check = %v, %v", problems, err)
	}
	for name, id := range docker.layers {
		if !d.Exists(id) {
			t.Fatalf("%s: layer %s does not exist", name, id)
		}
		want := mountByHand(t, home, id)
		got, err := d.Get(id, "")
		if err != nil {
			t.Fatal(err)
		}
		overlaytest.Compare(t, want, overlaytest.Tree(t, got, overlaytest.NoOverlayXattrs))
		if err := d.Put(id); err != nil {
			t.Error(err)
		}
		wantErr(t, d.Verify(t.Context(), id, nil), ErrNoDigests)
		must(t, d.RecordDigests(t.Context(), id))
		if got := differences(t, d, id); got != "" {
			t.Errorf("verify %s: %s", name, got)
		}
		want, isContainer := strings.Join(docker.diffs[name], "\n"), docker.diffs[name] != nil
		if !isContainer {
			continue
		}
		changes, err := d.Changes(id, id+"-init")
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, c := range changes {
			lines = append(lines, c.String())
		}
		overlaytest.Compare(t, want, strings.Join(lines, "\n"))
	}

	// Nothing of Docker's has changed, but for the times of directories in which merged
	// came and went, and the kernel's own.
	mountedIn := regexp.MustCompile(`^- "([0-9a-f]{64}(-init)?(/work(/work)?)?|\.)" dir `)
	after := overlaytest.Tree(t, home)
	for _, line := range strings.Split(overlaytest.Diff(before, after), "\n") {
		if strings.HasPrefix(line, "- ") && !mountedIn.MatchString(line) {
			t.Errorf("changed: %s", line)
		}
	}

	// Docker's layers take children and go away as ours do.
	if err := d.Create("ours", docker.layers["one"], nil); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"ours", docker.layers["two"], docker.layers["two"] + "-init", docker.layers["home:2"]} {
		if err := d.Remove(id); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
	if err := d.Remove(docker.layers["home:1"]); err == nil {
		t.Error("a layer with children was removed")
	}
	if err := d.Cleanup(); err != nil {
		t.Error(err)
	}
	if problems, err := d.Check(); err != nil || len(problems) > 0 {
		t.Errorf("Check = %v, %v", problems, err)
	}
}

// mountByHand mounts a layer as its files say, without the driver, and returns the tree.
func mountByHand(t *testing.T, home, id string) string {
	t.Helper()
	lowers := []string{filepath.Join(home, id, "diff")}
	text, err := os.ReadFile(filepath.Join(home, id, "lower"))
	if err != nil {
		t.Fatal(err)
	}
	for link := range strings.SplitSeq(string(text), ":") {
		lowers = append(lowers, filepath.Join(home, link))
	}
	o := overlaytest.Mount(t, lowers, "", "", filepath.Join(filepath.Dir(home), "by-hand"))
	defer o.Unmount()
	return overlaytest.Tree(t, o.Merged, overlaytest.NoOverlayXattrs)
}
