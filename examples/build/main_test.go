//go:build linux

package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// unpackBase makes an OCI layout of the image that the repository ships.
func unpackBase(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("tar", "-xf", "../../testdata/image/busybox.tar", "-C", dir).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir
}

// layers counts those in the home.
func layers(t *testing.T, home string) int {
	t.Helper()
	entries, err := os.ReadDir(home)
	must(t, err)
	return len(slices.DeleteFunc(entries, func(e os.DirEntry) bool { return e.Name() == "l" || e.Name() == "staging" }))
}

func TestBuild(t *testing.T) {
	overlaytest.Require(t, "root")
	base, dir := unpackBase(t), t.TempDir()
	home := filepath.Join(dir, "home")
	for _, name := range []string{"first", "second"} {
		out := filepath.Join(dir, name)
		must(t, build(home, base, out, "echo "+name+" >/etc/motd; mkdir -p /srv/data; rm -r /tmp; touch -d @0 /etc/motd"))
		img, err := open(out)
		must(t, err)
		old, err := open(base)
		must(t, err)
		had, err := old.Layers()
		must(t, err)
		now, err := img.Layers()
		must(t, err)
		if len(now) != len(had)+1 {
			t.Fatalf("%d layers, the base has %d", len(now), len(had))
		}
		must(t, validate.Layer(now[len(had)])) // digests and sizes
		r, err := now[len(had)].Uncompressed()
		must(t, err)
		var got []string
		for tr := tar.NewReader(r); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			got = append(got, h.Name)
			if h.Name == "etc/motd" {
				body, err := io.ReadAll(tr)
				must(t, err)
				if string(body) != name+"\n" {
					t.Errorf("etc/motd is %q", body)
				}
			}
		}
		must(t, r.Close())
		if want := "etc/ etc/motd srv/ srv/data/ .wh.tmp"; strings.Join(got, " ") != want {
			t.Errorf("the new layer has %q", got)
		}
		if n := layers(t, home); n != len(had) {
			t.Errorf("%d layers are kept, want the %d of the base", n, len(had))
		}
	}
}

// TestBuildFails: a command that fails, or a base that is not what its digests say, leaves no layer of the build.
func TestBuildFails(t *testing.T) {
	overlaytest.Require(t, "root")
	base, dir := unpackBase(t), t.TempDir()
	home := filepath.Join(dir, "home")
	var exit *exec.ExitError
	if err := build(home, base, filepath.Join(dir, "out"), "exit 3"); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("error %v, want exit status 3", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "out")); err == nil {
		t.Error("an image was written")
	}
	d, err := overlay2.New(home, overlay2.Options{})
	must(t, err)
	problems, err := d.Check()
	must(t, errors.Join(err, d.Cleanup()))
	if len(problems) > 0 {
		t.Errorf("check: %v", problems)
	}

	img, err := open(base)
	must(t, err)
	ls, err := img.Layers()
	must(t, err)
	good, err := ls[0].Digest()
	must(t, err)
	other, err := ls[3].Digest() // gzip too
	must(t, err)
	blob := func(hex string) string { return filepath.Join(base, "blobs", "sha256", hex) }
	must(t, os.Remove(blob(other.Hex)))
	must(t, os.Link(blob(good.Hex), blob(other.Hex)))
	home = filepath.Join(dir, "home2")
	if err := build(home, base, filepath.Join(dir, "out"), "true"); err == nil || !strings.Contains(err.Error(), "the layer's digest is") {
		t.Errorf("error %v, want one of the digest", err)
	}
	if n := layers(t, home); n != 3 {
		t.Errorf("%d layers are left, want the three below the bad one", n)
	}
}

// TestBuildAfterCrash: what a killed build left, and layers that were lost by a power cut, are made again.
func TestBuildAfterCrash(t *testing.T) {
	overlaytest.Require(t, "root")
	base, dir := unpackBase(t), t.TempDir()
	home := filepath.Join(dir, "home")
	must(t, build(home, base, filepath.Join(dir, "first"), "true"))
	had := layers(t, home)
	d, err := overlay2.New(home, overlay2.Options{})
	must(t, err)
	must(t, d.CreateReadWrite("build", "", nil))
	must(t, d.Cleanup())
	must(t, build(home, base, filepath.Join(dir, "second"), "true"))

	for _, lost := range []bool{false, true} {
		tops, err := filepath.Glob(filepath.Join(home, "*", "diff"))
		must(t, err)
		for _, diff := range tops {
			id := filepath.Base(filepath.Dir(diff))
			must(t, os.Symlink("empty", filepath.Join(home, id, "incomplete")))
			if !lost { // a kill leaves it at this
				continue
			}
			link, err := os.ReadFile(filepath.Join(home, id, "link"))
			must(t, err)
			at := filepath.Join(home, "l", string(link))
			must(t, os.Remove(at))
			must(t, os.Symlink("../"+id+"/incomplete", at))
		}
		must(t, build(home, base, filepath.Join(dir, fmt.Sprint("third-", lost)), "test -x /bin/busybox"))
		if n := layers(t, home); n != had {
			t.Errorf("%d layers are kept, want %d", n, had)
		}
		d, err := overlay2.New(home, overlay2.Options{})
		must(t, err)
		problems, err := d.Check()
		must(t, errors.Join(err, d.Cleanup()))
		if len(problems) > 0 {
			t.Errorf("check: %v", problems)
		}
	}
}
