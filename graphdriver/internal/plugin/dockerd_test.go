//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// clients names what OVERLAY2_TEST_CLIENTS asks for: "quick", or "all" that takes minutes.
func clients() string { return os.Getenv("OVERLAY2_TEST_CLIENTS") }

// TestDockerd lets Debian's unmodified dockerd work on this library through the plugin. Each part goes on with what
// those before it left.
func TestDockerd(t *testing.T) {
	overlaytest.Require(t, "clients")
	m := newMachine(t)
	base := image{"base:1", readLayers(t, "../../../testdata/image/busybox.tar")}
	deep := image{"deep:1", slices.Clone(base.layers)}
	for len(deep.layers) < 122 {
		n := fmt.Sprint(len(deep.layers))
		deep.layers = append(deep.layers, layerTar(t, "n/"+n, n, "last", n))
	}
	saved := make(map[string]string) // what docker save wrote first, by image
	m.start()
	for _, part := range []struct {
		name string
		f    func(m *machine)
	}{
		{"load", func(m *machine) { m.load(base); m.load(deep) }},
		{"save", func(m *machine) { m.saveSame(base, saved); m.saveSame(deep, saved) }},
		{"run", (*machine).runBoxes},
		{"build", func(m *machine) { m.build("0"); m.build("1") }},
		{"diff", (*machine).change},
		{"kill plugin", func(m *machine) { m.killed(m.killPlugin) }},
		{"kill daemon", func(m *machine) { m.killed(func() { m.killDaemon(); m.startDaemon(m.name) }) }},
		{"kill both", func(m *machine) { m.killed(m.killBoth) }},
		{"kill plugin during load", func(m *machine) { m.killDuringLoad(deep) }},
		{"same after that", func(m *machine) { m.sameSaved(saved) }},
		{"swap", func(m *machine) { m.swap(saved) }},
		{"remove", (*machine).removeAll},
	} {
		ok := t.Run(part.name, func(t *testing.T) {
			p := m.in(t)
			part.f(p)
			m.plugin, m.daemon = p.plugin, p.daemon
		})
		if !ok {
			t.FailNow()
		}
	}
	m.stop()
	if left := mounts(t, m.path("data")); len(left) > 0 {
		t.Errorf("still mounted: %q", left)
	}
}

func (m *machine) load(i image) {
	m.t.Helper()
	file := m.path("image.tar")
	i.write(m.t, file)
	m.equal("load", m.docker("load", "-q", "-i", file), "Loaded image: "+i.name+"\n")
}

// save returns what docker save writes, and its digest.
func (m *machine) save(name string) (b []byte, digest string) {
	m.t.Helper()
	b = []byte(m.docker("save", name))
	sum := sha256.Sum256(b)
	return b, hex.EncodeToString(sum[:])
}

// saveSame: docker save returns the tars that were loaded; what it wrote can be loaded and saved again, byte for byte.
func (m *machine) saveSame(i image, saved map[string]string) {
	m.t.Helper()
	b, digest := m.save(i.name)
	i.checkSaved(m.t, b)
	file := m.path("saved.tar")
	must(m.t, os.WriteFile(file, b, 0o600))
	m.docker("rmi", i.name)
	m.docker("load", "-q", "-i", file)
	if _, again := m.save(i.name); again != digest {
		m.t.Errorf("%s: saved as %s, loaded, saved as %s", i.name, digest, again)
	}
	saved[i.name] = digest
}

// sameSaved: docker save writes what it wrote first.
func (m *machine) sameSaved(saved map[string]string) {
	m.t.Helper()
	for name, want := range saved {
		if _, digest := m.save(name); digest != want {
			m.t.Errorf("%s: saved as %s, and now as %s", name, want, digest)
		}
	}
}

func (m *machine) runBoxes() {
	m.equal("hello", m.box("base:1", "cat /etc/motd /opt/app/three; ls /opt /var/was-a-file", "--rm"),
		"A busybox on overlay2, changed by the third layer.\nthe only one left\n/opt:\napp\n\n/var/was-a-file:\ninside\n")
	m.equal("122 layers", m.box("deep:1", "cat /last; ls /n | wc -l; cat /n/50", "--rm"), "121117\n50")
}

// build builds in the classic way and by BuildKit, with layers from another stage.
func (m *machine) build(buildKit string) {
	m.t.Helper()
	name := "built:" + buildKit
	dockerfile := `FROM base:1 AS first
RUN mkdir /made && echo by kit ` + buildKit + ` >/made/it && rm /etc/passwd
FROM base:1
COPY --from=first /made /made
COPY file /copied
RUN rm -r /opt/app && mkdir /opt/app && echo fresh >/opt/app/new && ln /opt/app/new /opt/app/again
`
	must(m.t, os.WriteFile(m.path("ctx/Dockerfile"), []byte(dockerfile), 0o644))
	must(m.t, os.WriteFile(m.path("ctx/file"), []byte("of the context\n"), 0o644))
	c := m.command("build", "--network", "none", "-t", name, m.path("ctx"))
	c.Env = append(c.Env, "DOCKER_BUILDKIT="+buildKit)
	m.run(c)
	m.equal(name, m.box(name, "cat /made/it /copied; ls /opt/app; wc -l </etc/passwd", "--rm"), "by kit "+buildKit+"\nof the context\nagain\nnew\n2\n")
}

// change: docker diff, commit and export of a container that changed what it could.
func (m *machine) change() {
	m.box("base:1", `echo new >/etc/new; rm /etc/motd; echo more >>/etc/passwd; mkdir /d; rm -r /opt/app; mkdir /opt/app; echo z >/opt/app/z
		chmod 700 /home; rm /var/was-a-directory; mkdir /var/was-a-directory; ln -s nowhere /d/link`, "--name", "changed")
	m.equal("diff", sorted(m.docker("diff", "changed")), `A /d
A /d/link
A /etc/new
A /opt/app/z
C /etc
C /etc/passwd
C /home
C /opt
C /opt/app
C /var
C /var/was-a-directory
D /etc/motd
D /opt/app/three`)
	m.docker("commit", "changed", "committed:1")
	look := "cat /etc/new /opt/app/z; ls -a /opt/app /var/was-a-directory; ls /etc; stat -c %a /home; readlink /d/link"
	m.equal("committed", m.box("committed:1", look+"; test ! -e /etc/motd", "--rm"),
		"new\nz\n/opt/app:\n.\n..\nz\n\n/var/was-a-directory:\n.\n..\ngroup\nhostname\nhosts\nmtab\nnew\npasswd\nresolv.conf\n700\nnowhere\n")
	exported := make(map[string]byte)
	for tr := tar.NewReader(strings.NewReader(m.docker("export", "changed"))); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		must(m.t, err)
		exported[strings.TrimSuffix(h.Name, "/")] = h.Typeflag
	}
	for name, want := range map[string]byte{"etc/new": tar.TypeReg, "opt/app/z": tar.TypeReg, "d/link": tar.TypeSymlink, "dev/null": 0, "usr/local/bin/hello": tar.TypeReg, "var/run/pipe": tar.TypeFifo, "etc/motd": 0, "opt/app/three": 0, "opt/legacy": 0} {
		if name == "dev/null" {
			want = exported[name] // a device, or what Docker mounts over /dev
		}
		if exported[name] != want {
			m.t.Errorf("export: %s has type %q, want %q", name, exported[name], want)
		}
	}
	m.docker("rm", "changed")
}

// sorted sorts lines, which Docker has in any order.
func sorted(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// images lists all images, whenever they were made.
func (m *machine) images() string {
	m.t.Helper()
	return sorted(m.docker("images", "-a", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"))
}

func (m *machine) killPlugin() {
	m.t.Helper()
	m.end(m.plugin, unix.SIGKILL)
	m.startPlugin()
}

func (m *machine) killBoth() {
	m.t.Helper()
	m.killDaemon()
	m.killPlugin()
	m.startDaemon(m.name)
}

// killed: a container and its files outlive kill -9 of what kill kills, and it can be stopped, started and removed.
func (m *machine) killed(kill func()) {
	m.t.Helper()
	m.box("deep:1", "echo kept >>/kept; sync; while true; do sleep 1; done", "-d", "--name", "box")
	m.box("base:1", "echo once >/once", "--name", "ended")
	m.wait("box", func() bool { return m.command("exec", "box", "cat", "/kept").Run() == nil })
	images := m.images()
	kill()
	m.equal("images", m.images(), images)
	m.docker("restart", "-t", "0", "box")
	m.equal("box", m.docker("exec", "box", "cat", "/last"), "121")
	m.wait("box", func() bool { return m.docker("exec", "box", "cat", "/kept") == "kept\nkept\n" })
	m.equal("ended", m.docker("diff", "ended"), "A /once\n")
	m.docker("cp", "ended:/once", m.path("once"))
	m.docker("rm", "-f", "box", "ended")
	for _, point := range mounts(m.t, m.path("data/"+m.name)) {
		m.t.Errorf("without a container, there is mounted %s", point)
	}
}

// killDuringLoad: a load that the plugin's death breaks leaves nothing that harms the next.
func (m *machine) killDuringLoad(i image) {
	m.t.Helper()
	cuts := 2
	if clients() == "all" {
		cuts = 20
	}
	file := m.path("image.tar")
	other := image{"other:1", slices.Clone(i.layers)}
	// Another lowest layer: else the daemon has all layers already.
	other.layers[0] = append(layerTar(m.t, "other", "x")[:1024], other.layers[0]...)
	other.write(m.t, file)
	for cut := range cuts {
		c := m.command("load", "-q", "-i", file)
		var out bytes.Buffer
		c.Stdout, c.Stderr = &out, &out
		must(m.t, c.Start())
		time.Sleep(time.Duration(300+400*cut) * time.Millisecond)
		m.killPlugin()
		err := c.Wait()
		m.t.Logf("load of 122 layers, plugin killed: %v %s", err, strings.TrimSpace(out.String()))
		if err == nil { // the daemon called again, and the new plugin went on
			b, _ := m.save(other.name)
			other.checkSaved(m.t, b)
			m.docker("rmi", other.name)
		}
	}
	m.docker("load", "-q", "-i", file)
	b, _ := m.save(other.name)
	other.checkSaved(m.t, b)
	m.docker("rmi", other.name)
}

// swap: the home that the plugin filled goes on under dockerd's own overlay2 driver, and comes back.
func (m *machine) swap(saved map[string]string) {
	m.box("base:1", "if test -e /n; then cat /n; fi; echo from a container >>/n", "--name", "moved")
	images := m.images()
	m.stop()
	// What New of a plugin that was killed has mounted over the home nobody undoes.
	if err := unix.Unmount(m.path("data/"+m.name), unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL {
		m.t.Fatal(err)
	}
	m.rename(m.name, "overlay2")
	m.startDaemon("overlay2")
	m.equal("images under overlay2", m.images(), images)
	m.sameSaved(saved)
	m.equal("container under overlay2", m.docker("start", "-a", "moved"), "from a container\n")
	m.equal("diff under overlay2", m.docker("diff", "moved"), "A /n\n")
	m.equal("deep under overlay2", m.box("deep:1", "cat /last", "--rm"), "121")
	m.docker("commit", "moved", "stock:1")
	_, stock := m.save("stock:1")
	saved["stock:1"] = stock
	m.box("stock:1", "echo stock >/stock; rm /etc/motd", "--name", "stock")
	images = m.images()
	m.end(m.daemon, unix.SIGTERM)
	m.rename("overlay2", m.name)
	m.start()
	m.equal("images again", m.images(), images)
	m.sameSaved(saved)
	m.equal("container again", m.docker("start", "-a", "moved"), "from a container\nfrom a container\n")
	m.equal("diff of the stock driver's container", sorted(m.docker("diff", "stock")), "A /stock\nC /etc\nD /etc/motd")
	m.equal("stock's image", m.box("stock:1", "cat /n", "--rm"), "from a container\nfrom a container\n")
}

// rename gives what one driver left to another: its home, its image store and its containers.
func (m *machine) rename(from, to string) {
	m.t.Helper()
	must(m.t, os.Rename(m.path("data/"+from), m.path("data/"+to)))
	must(m.t, os.Rename(m.path("data/image/"+from), m.path("data/image/"+to)))
	configs, err := filepath.Glob(m.path("data/containers/*/config.v2.json"))
	must(m.t, err)
	if len(configs) == 0 {
		m.t.Fatal("no containers to move")
	}
	for _, config := range configs {
		b, err := os.ReadFile(config)
		must(m.t, err)
		mended := bytes.ReplaceAll(b, []byte(`"Driver":"`+from+`"`), []byte(`"Driver":"`+to+`"`))
		if bytes.Equal(b, mended) {
			m.t.Fatalf("%s names no driver", config)
		}
		must(m.t, os.WriteFile(config, mended, 0o600))
	}
}

// removeAll: when all images and containers are removed, nothing is left in the home.
func (m *machine) removeAll() {
	m.docker(append([]string{"rm", "-f"}, strings.Fields(m.docker("ps", "-aq"))...)...)
	m.docker(append([]string{"rmi", "-f"}, strings.Fields(m.docker("images", "-q"))...)...)
	m.docker("image", "prune", "-af")
	m.docker("builder", "prune", "-af")
	home := m.path("data/" + m.name)
	left, err := filepath.Glob(home + "/*/diff")
	must(m.t, err)
	links, err := filepath.Glob(home + "/l/*")
	must(m.t, err)
	if len(left)+len(links) > 0 {
		m.t.Errorf("left in the home: %q, %q", left, links)
	}
}
