package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// client runs a program that must end well and returns what it printed, without the last newline.
func client(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, said.Bytes())
	}
	return strings.TrimSuffix(string(out), "\n")
}

// lowerTemp returns a directory whose name has no capital: what reads references of images takes none in a path.
func lowerTemp(t testing.TB) string {
	t.Helper()
	parent := os.TempDir()
	if parent != strings.ToLower(parent) {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "clients-")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	return dir
}

// changedImage is the shipped image with a layer on top that a container made, exported in both forms.
type changedImage struct {
	o            *tool
	box          string // where its tree is mounted
	layout, file string
	id           string // digest of its config
}

func newChangedImage(t *testing.T) changedImage {
	t.Helper()
	dir := lowerTemp(t)
	c := changedImage{o: newTool(t), layout: filepath.Join(dir, "layout"), file: filepath.Join(dir, "image.tar")}
	c.o.do("import", shipped, "--name", "base")
	c.box = c.o.mount("box", "base")
	change(t, c.box)
	c.o.do("commit", "box", "--name", "demo/app:v1", "-m", "why")
	var e exported
	c.o.json(&e, "export", "demo/app:v1", "--to", c.layout)
	c.o.do("export", "demo/app:v1", "--to", c.file)
	c.id = e.ID
	t.Cleanup(func() { c.o.do("umount", "box") })
	return c
}

// comesBack imports what a client wrote: the same tree, and the same image unless the client wrote another config.
func (c changedImage) comesBack(t *testing.T, from string, sameID bool) {
	t.Helper()
	other := newTool(t)
	other.do("import", from, "--name", "back")
	same(t, c.box, other.mount("box", "back"))
	var l listing
	other.json(&l, "ls")
	if len(l.Images) != 1 || sameID && l.Images[0].ID != c.id {
		t.Errorf("image %+v, was %s", l.Images, c.id)
	}
	other.do("umount", "box")
}

// TestRegistry: an image built here is pushed to a registry and pulled from it.
func TestRegistry(t *testing.T) {
	overlaytest.Require(t, "root", "cmd:docker-registry", "cmd:skopeo")
	c := newChangedImage(t)
	address := startRegistry(t)
	ref := "docker://" + address + "/demo/app:v1"
	client(t, "skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", "oci:"+c.layout+":v1", ref)
	var config struct {
		History []struct{ Comment string }
	}
	must(t, json.Unmarshal([]byte(client(t, "skopeo", "--insecure-policy", "inspect", "--tls-verify=false", "--config", ref)), &config))
	if n := len(config.History); n == 0 || config.History[n-1].Comment != "why" {
		t.Errorf("history: %+v", config.History)
	}
	for _, to := range []string{"oci:%s:x", "oci-archive:%s:x", "docker-archive:%s:a/b:x"} {
		path := filepath.Join(t.TempDir(), "pulled")
		client(t, "skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", ref, fmt.Sprintf(to, path))
		c.comesBack(t, path, true)
	}
}

// startRegistry starts a registry that the test's end stops, and returns its address.
func startRegistry(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	address := l.Addr().String()
	must(t, l.Close())
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yml")
	must(t, os.WriteFile(config, fmt.Appendf(nil, "version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: '%s'}\n", filepath.Join(dir, "data"), address), 0o600))
	cmd := exec.Command("docker-registry", "serve", config)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	must(t, cmd.Start())
	t.Cleanup(func() {
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("registry: %s", said.Bytes())
		}
	})
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		answer, err := http.Get("http://" + address + "/v2/")
		if err == nil {
			must(t, answer.Body.Close())
			return address
		}
		if time.Now().After(end) {
			t.Fatalf("the registry does not answer: %v", err)
		}
	}
}

// TestPodman: podman loads what is exported, and what it saves is the same here.
func TestPodman(t *testing.T) {
	overlaytest.Require(t, "root", "cmd:podman")
	c := newChangedImage(t)
	dir := lowerTemp(t)
	podman := func(args ...string) string {
		t.Helper()
		return client(t, "podman", append([]string{
			"--root", dir + "/root", "--runroot", dir + "/run", "--tmpdir", dir + "/tmp", "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file",
		}, args...)...)
	}
	for _, from := range []string{c.file, "oci:" + c.layout + ":v1"} {
		id := podman("pull", "-q", strings.Replace(from, c.file, "docker-archive:"+c.file, 1))
		if id != c.id {
			t.Errorf("podman has image %s, not %s", id, c.id)
		}
		for _, format := range []string{"oci-archive", "docker-archive", "oci-dir"} {
			to := filepath.Join(lowerTemp(t), "saved")
			podman("save", "-q", "--format", format, "-o", to, id)
			c.comesBack(t, to, format == "docker-archive" && strings.HasSuffix(from, ".tar"))
		}
		podman("rmi", "-f", id)
	}
}

// TestBuildah: buildah builds on what is exported, and what it builds is imported.
func TestBuildah(t *testing.T) {
	overlaytest.Require(t, "root", "cmd:buildah", "cmd:umoci")
	c := newChangedImage(t)
	dir := lowerTemp(t)
	buildah := func(args ...string) string {
		t.Helper()
		return client(t, "buildah", append([]string{"--root", dir + "/root", "--runroot", dir + "/run", "--storage-driver", "vfs"}, args...)...)
	}
	base := buildah("pull", "-q", "oci:"+c.layout+":v1")
	context := filepath.Join(dir, "context")
	must(t, os.Mkdir(context, 0o700))
	must(t, os.WriteFile(filepath.Join(context, "added"), []byte("added"), 0o640))
	must(t, os.WriteFile(filepath.Join(context, "Containerfile"),
		[]byte("FROM "+base+"\nCOPY added /added\nRUN rm /new/one && mkdir /made && echo built >/made/by\nRUN rm -r /new/dir\nENV A=b\n"), 0o600))
	buildah("build", "-q", "--isolation", "chroot", "--network", "host", "--layers", "-t", "built:1", context)
	written := filepath.Join(dir, "built")
	buildah("push", "-q", "localhost/built:1", "oci:"+written+":x")
	archive := filepath.Join(dir, "built.tar")
	buildah("push", "-q", "localhost/built:1", "docker-archive:"+archive)
	box := asUmociSees(t, written, archive)
	if data, err := os.ReadFile(filepath.Join(box, "made/by")); err != nil || string(data) != "built\n" {
		t.Errorf("made/by holds %q, %v", data, err)
	}
	for _, name := range []string{"new/one", "new/dir"} {
		if _, err := os.Lstat(filepath.Join(box, name)); err == nil {
			t.Errorf("%s is still there", name)
		}
	}
	// A container's own changes, committed.
	container := buildah("from", base)
	buildah("run", "--isolation", "chroot", container, "--", "/bin/sh", "-c", "rm -r /new; mkdir /new; echo x >/new/y")
	written = filepath.Join(dir, "committed")
	buildah("commit", "-q", container, "oci:"+written+":x")
	box = asUmociSees(t, written)
	if names, err := os.ReadDir(filepath.Join(box, "new")); err != nil || len(names) != 1 || names[0].Name() != "y" {
		t.Errorf("new holds %v, %v", names, err)
	}
	buildah("rm", container)
}

// asUmociSees imports an image that lies in an OCI layout, and in other forms, and compares the trees with the one that
// umoci unpacks, of which it returns the path. (buildah's own store gives some hard links mode 0.)
func asUmociSees(t *testing.T, layout string, others ...string) string {
	t.Helper()
	bundle := filepath.Join(t.TempDir(), "bundle")
	client(t, "umoci", "unpack", "--image", layout+":x", bundle)
	want := filepath.Join(bundle, "rootfs")
	for _, from := range append(others, layout) {
		o := newTool(t)
		o.do("import", from, "--name", "back")
		same(t, want, o.mount("box", "back"))
		o.do("umount", "box")
	}
	return want
}

// TestDockerSave: docker loads what is exported, and what it saves is the same image here.
func TestDockerSave(t *testing.T) {
	overlaytest.Require(t, "dockerd")
	c := newChangedImage(t)
	daemon := overlaytest.NewDockerd(t, t.TempDir())
	daemon.Start("--storage-driver", "overlay2")
	daemon.Docker("load", "-q", "-i", c.file)
	if id := daemon.Docker("image", "inspect", "-f", "{{.Id}}", "demo/app:v1"); id != "sha256:"+c.id {
		t.Errorf("docker has image %s, not %s", id, c.id)
	}
	to := filepath.Join(t.TempDir(), "saved.tar")
	daemon.Docker("save", "-o", to, "demo/app:v1")
	c.comesBack(t, to, true)
}
