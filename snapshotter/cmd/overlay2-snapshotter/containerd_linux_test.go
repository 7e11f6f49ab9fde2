package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// clientsEnv lets TestContainerd run: make test-containerd sets it.
const clientsEnv = "OVERLAY2_TEST_CLIENTS"

// machine is a containerd of its own with the plugin: no directory, socket or process is shared with another.
type machine struct {
	t          *testing.T
	dir        string
	namespace  string // of containerd's names, and of runc's, which lie in /run
	plugin     *plugin
	containerd *exec.Cmd
	log        *os.File
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	overlaytest.Require(t, "root", "cmd:containerd", "cmd:ctr", "cmd:runc", "cmd:containerd-shim-runc-v2")
	dir, err := os.MkdirTemp("", "ctrd-") // t.TempDir's names are too long for sockets
	must(t, err)
	m := &machine{t: t, dir: dir, namespace: fmt.Sprintf("overlay2test%d", os.Getpid())}
	t.Cleanup(m.clean)
	m.log, err = os.Create(m.path("containerd.log"))
	must(t, err)
	m.configure()
	m.plugin = start(t, dir)
	m.startContainerd()
	return m
}

// configure writes containerd's configuration: the snippet for its version, with our paths, and without CRI.
func (m *machine) configure() {
	m.t.Helper()
	version, err := exec.Command("containerd", "--version").Output()
	must(m.t, err)
	name, cri := "containerd-1.toml", `"io.containerd.grpc.v1.cri"`
	if strings.Contains(string(version), "/v2 ") {
		name, cri = "containerd.toml", `"io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"`
	}
	m.t.Logf("%s with %s", strings.TrimSpace(string(version)), name)
	snippet, err := os.ReadFile(filepath.Join("..", "..", "config", name))
	must(m.t, err)
	config := strings.NewReplacer("/run/overlay2-snapshotter/overlay2-snapshotter.sock", m.path("sock/s.sock"), "/var/lib/overlay2-snapshotter", m.path("root")).Replace(string(snippet))
	head := fmt.Sprintf("root = %q\nstate = %q\ndisabled_plugins = [%s]\n", m.path("ctrd-root"), m.path("ctrd-state"), cri)
	must(m.t, os.WriteFile(m.path("config.toml"), []byte(head+config+fmt.Sprintf("[grpc]\naddress = %q\n", m.path("c.sock"))), 0o600))
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) startContainerd() {
	m.t.Helper()
	m.containerd = exec.Command("containerd", "--config", m.path("config.toml"))
	m.containerd.Stdout, m.containerd.Stderr = m.log, m.log
	must(m.t, m.containerd.Start())
	var err error
	for range 600 {
		if _, err = m.try("version"); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	m.t.Fatalf("containerd does not answer: %v", err)
}

func (m *machine) stopContainerd(sig os.Signal) {
	m.t.Helper()
	must(m.t, m.containerd.Process.Signal(sig))
	_ = m.containerd.Wait()
}

// killPlugin kills the plugin and starts another. containerd is given time to connect again, before which its calls fail.
func (m *machine) killPlugin() {
	m.t.Helper()
	must(m.t, m.plugin.cmd.Process.Kill())
	<-m.plugin.done
	m.plugin = start(m.t, m.dir)
	if m.containerd.ProcessState != nil {
		return
	}
	var err error
	for range 600 {
		if _, err = m.try("snapshots", onOverlay2, "ls"); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	m.t.Fatal(err)
}

// try calls ctr and returns what it prints.
func (m *machine) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ctr", append([]string{"--address", m.path("c.sock"), "--namespace", m.namespace}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("ctr %q: %w: %s%s", args, err, out.String(), errs.String())
	}
	return strings.TrimSpace(out.String()), nil
}

func (m *machine) ctr(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

// clean ends all that was started, and removes all that was mounted.
func (m *machine) clean() {
	if m.t.Failed() {
		log, _ := os.ReadFile(m.path("containerd.log"))
		m.t.Logf("containerd: %s\nplugin: %s", tail(string(log)), tail(m.plugin.logged()))
	}
	if m.containerd != nil && m.containerd.ProcessState == nil {
		_ = m.containerd.Process.Kill()
		_ = m.containerd.Wait()
	}
	m.killShims()
	_ = m.plugin.cmd.Process.Kill()
	<-m.plugin.done
	mounts, _ := os.ReadFile("/proc/self/mounts")
	lines := strings.Split(string(mounts), "\n")
	slices.Reverse(lines)
	for _, line := range lines {
		if fields := strings.Fields(line); len(fields) > 1 && strings.HasPrefix(fields[1], m.dir+"/") {
			_ = unix.Unmount(fields[1], unix.MNT_DETACH)
		}
	}
	if err := errors.Join(os.RemoveAll(m.dir), os.RemoveAll(filepath.Join("/run/containerd/runc", m.namespace))); err != nil {
		m.t.Error(err)
	}
}

// killShims kills the shims that a test which has failed has left; they know containerd's socket. Their containers end with them.
func (m *machine) killShims() {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range lines {
		data, _ := os.ReadFile(file)
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err == nil && slices.Contains(strings.Split(string(data), "\x00"), m.path("c.sock")) {
			children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
			for _, child := range append(strings.Fields(string(children)), strconv.Itoa(pid)) {
				if n, err := strconv.Atoi(child); err == nil {
					_ = syscall.Kill(n, syscall.SIGKILL)
				}
			}
		}
	}
}

func tail(s string) string { return s[max(0, len(s)-6000):] }

const (
	demo       = "docker.io/library/demo:1"
	onOverlay2 = "--snapshotter=overlay2"
)

// makeImage writes an image as docker save does: three layers, of which the upper delete files of the lower.
func (m *machine) makeImage(file string) {
	m.t.Helper()
	build := exec.Command("go", "build", "-o", m.path("box"), "../../internal/box")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		m.t.Fatalf("%v: %s", err, out)
	}
	box, err := os.ReadFile(m.path("box"))
	must(m.t, err)
	big := strings.Repeat("0123456789abcdef", 1<<16)
	layers := [][]string{
		{"box", string(box), "etc/motd", "old\n", "data/gone", "1", "data/dir/a", "1", "data/big", big},
		{"etc/motd", "hello\n", "data/.wh.gone", "", "data/dir/.wh..wh..opq", "", "data/dir/b", "2"},
		{"data/more", "3", ".wh.none", ""},
	}
	var config struct {
		Architecture string   `json:"architecture"`
		OS           string   `json:"os"`
		Config       struct{} `json:"config"`
		Rootfs       struct {
			Type    string   `json:"type"`
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	config.Architecture, config.OS, config.Rootfs.Type = "amd64", "linux", "layers"
	var names, files []string
	for i, l := range layers {
		data := tarOf(m.t, l...)
		name := fmt.Sprintf("%d.tar", i)
		names, files = append(names, name), append(files, name, string(data))
		config.Rootfs.DiffIDs = append(config.Rootfs.DiffIDs, fmt.Sprintf("sha256:%x", sha256.Sum256(data)))
	}
	c, err := json.Marshal(config)
	must(m.t, err)
	manifest, err := json.Marshal([]map[string]any{{"Config": "config.json", "RepoTags": []string{"demo:1"}, "Layers": names}})
	must(m.t, err)
	must(m.t, os.WriteFile(file, tarOf(m.t, append(files, "config.json", string(c), "manifest.json", string(manifest))...), 0o600))
}

// tarOf makes a tar of names and contents in turn.
func tarOf(t *testing.T, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		must(t, w.WriteHeader(&tar.Header{Name: files[i], Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(files[i+1]))}))
		_, err := io.WriteString(w, files[i+1])
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// run runs a command in a new container and returns what it prints.
func (m *machine) run(id string, command ...string) string {
	m.t.Helper()
	return m.ctr(append([]string{"run", "--rm", onOverlay2, demo, id, "/box"}, command...)...)
}

// checkImage runs containers that look at what the image must show.
func (m *machine) checkImage(id string) {
	m.t.Helper()
	for i, c := range []struct {
		command []string
		want    string
	}{
		{[]string{"cat", "/etc/motd"}, "hello"},
		{[]string{"ls", "/data"}, "big\ndir\nmore"},
		{[]string{"ls", "/data/dir"}, "b"},
	} {
		if got := m.run(fmt.Sprint(id, i), c.command...); got != c.want {
			m.t.Errorf("%q prints %q, not %q", c.command, got, c.want)
		}
	}
}

// snapshots lists the kinds of all snapshots.
func (m *machine) snapshots() map[string]int {
	m.t.Helper()
	kinds := map[string]int{}
	for _, line := range strings.Split(m.ctr("snapshots", onOverlay2, "ls"), "\n")[1:] {
		fields := strings.Fields(line)
		kinds[fields[len(fields)-1]]++
	}
	return kinds
}

// TestContainerd: a containerd, unmodified, that of PATH, imports an image, runs containers by runc, commits, removes and collects garbage; while
// the plugin is restarted and killed in between, and in the midst of it.
func TestContainerd(t *testing.T) {
	overlaytest.Require(t, "clients")
	m := newMachine(t)
	image := m.path("image.tar")
	m.makeImage(image)
	m.ctr("images", "import", onOverlay2, image)
	if got := fmt.Sprint(m.snapshots()); got != "map[Committed:3]" {
		t.Errorf("after the import there are %s", got)
	}
	m.checkImage("first")

	// A container that runs while the plugin is killed, and containerd after it.
	m.ctr("run", "-d", onOverlay2, demo, "long", "/box", "wait")
	exec1 := func(id string, command ...string) string {
		t.Helper()
		return m.ctr(append([]string{"task", "exec", "--exec-id", id, "long", "/box"}, command...)...)
	}
	exec1("e1", "write", "/written", "by the container")
	exec1("e2", "rm", "/etc/motd")
	m.killPlugin()
	if got := exec1("e3", "cat", "/written"); got != "by the container" {
		t.Errorf("the container reads %q", got)
	}
	m.checkImage("second")
	m.stopContainerd(syscall.SIGKILL)
	m.killPlugin()
	m.startContainerd()
	if got := exec1("e4", "cat", "/data/more"); got != "3" {
		t.Errorf("the container reads %q", got)
	}
	m.checkImage("third")
	m.checkDiff("long", []string{"written", "etc/.wh.motd"})
	m.commit(t)

	// Stopped, and begun again over what it had written.
	m.ctr("task", "kill", "--signal", "SIGKILL", "long")
	m.ctr("task", "rm", "--force", "long")
	m.ctr("container", "rm", "long")
	m.killInTheMidst(t, image)

	m.ctr("images", "rm", "--sync", demo)
	m.wantEmpty()
	m.stopContainerd(syscall.SIGTERM)
	m.plugin.stop(t)
	problems, err := overlay2.CheckHome(m.path("root/layers"))
	must(t, err)
	for _, p := range problems {
		t.Errorf("check: %v", p)
	}
}

// checkDiff fails the test unless the diff of a snapshot holds these files.
func (m *machine) checkDiff(key string, want []string) {
	m.t.Helper()
	diff := m.ctr("snapshots", onOverlay2, "diff", "--media-type", "application/vnd.oci.image.layer.v1.tar", key)
	names := map[string]bool{}
	for r := tar.NewReader(strings.NewReader(diff)); ; {
		h, err := r.Next()
		if err != nil {
			break // its end was trimmed
		}
		names[h.Name] = true
	}
	for _, name := range want {
		if !names[name] {
			m.t.Errorf("the diff of %s lacks %s: %v", key, name, names)
		}
	}
}

// commit makes a snapshot of what was written to another, by the mounts that ctr prints.
func (m *machine) commit(t *testing.T) {
	t.Helper()
	var top string
	for _, line := range strings.Split(m.ctr("snapshots", onOverlay2, "ls"), "\n") {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "long" {
			top = f[1]
		}
	}
	target := m.path("target")
	must(t, os.MkdirAll(target, 0o755))
	mounted := func(key string, f func()) {
		t.Helper()
		command := m.ctr("snapshots", onOverlay2, "mounts", target, key)
		if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
		defer func() { must(t, unix.Unmount(target, 0)) }()
		f()
	}
	m.ctr("snapshots", onOverlay2, "prepare", "work", top)
	mounted("work", func() { must(t, os.WriteFile(target+"/new", []byte("new"), 0o644)) })
	m.killPlugin()
	m.ctr("snapshots", onOverlay2, "commit", "committed", "work")
	m.killPlugin()
	m.ctr("snapshots", onOverlay2, "view", "seen", "committed")
	mounted("seen", func() {
		for name, want := range map[string]string{"new": "new", "etc/motd": "hello\n"} {
			if data, err := os.ReadFile(filepath.Join(target, name)); err != nil || string(data) != want {
				t.Errorf("%s holds %q: %v", name, data, err)
			}
		}
		if err := os.WriteFile(target+"/x", nil, 0o644); !errors.Is(err, unix.EROFS) {
			t.Errorf("a view is written: %v", err)
		}
	})
	m.checkDiff("committed", []string{"new"})
	if _, err := m.try("snapshots", onOverlay2, "rm", top); err == nil {
		t.Error("a parent was removed")
	}
	// ctr holds what it prepares, but no views: from now on both are garbage.
	m.ctr("snapshots", onOverlay2, "label", "committed", "containerd.io/gc.root=")
}

// killInTheMidst kills the plugin while an image is unpacked and containers start and end. Then the same works.
func (m *machine) killInTheMidst(t *testing.T, image string) {
	t.Helper()
	rounds := 5
	if os.Getenv(clientsEnv) == "all" {
		rounds = 40
	}
	failed := 0
	for i := range rounds {
		if i%2 == 0 {
			m.ctr("images", "rm", "--sync", demo)
		}
		done := make(chan error, 1)
		go func() {
			_, err := m.try("images", "import", onOverlay2, image)
			if err == nil {
				_, err = m.try("run", "--rm", onOverlay2, demo, fmt.Sprint("cut", i), "/box", "ls", "/data")
			}
			done <- err
		}()
		time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond)
		m.killPlugin()
		if <-done != nil {
			failed++
		}
		m.removeLeft(fmt.Sprint("cut", i))
		// Without snapshots killPlugin could not tell whether containerd has connected again.
		_, err := m.try("images", "import", onOverlay2, image)
		for n := 0; n < 100 && err != nil && strings.Contains(err.Error(), "unavailable"); n++ {
			time.Sleep(100 * time.Millisecond)
			_, err = m.try("images", "import", onOverlay2, image)
		}
		must(t, err)
		m.checkImage(fmt.Sprint("after", i))
	}
	t.Logf("%d kills in the midst, %d of them were noticed", rounds, failed)
}

// removeLeft removes a container that a run which failed has left.
func (m *machine) removeLeft(id string) {
	_, _ = m.try("task", "rm", "--force", id)
	_, _ = m.try("container", "rm", id)
	_, _ = m.try("snapshots", onOverlay2, "rm", id)
}

// wantEmpty waits until garbage collection has taken all snapshots and their layers.
func (m *machine) wantEmpty() {
	m.t.Helper()
	var left []string
	for range 300 {
		left = nil
		entries, err := os.ReadDir(m.path("root/layers"))
		must(m.t, err)
		for _, e := range entries {
			if _, err := strconv.Atoi(e.Name()); err == nil {
				left = append(left, e.Name())
			}
		}
		if len(left) == 0 && len(m.snapshots()) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	m.t.Errorf("there are snapshots %s, and layers %v", m.ctr("snapshots", onOverlay2, "ls"), left)
}
