package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/tree"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

const shipped = "../../testdata/image/busybox.tar"

// helperVariable makes the test binary be the tool: some tests need processes of their own.
const helperVariable = "OVERLAY2_TEST_AS_TOOL"

func TestMain(m *testing.M) {
	if os.Getenv(helperVariable) != "" {
		main()
	}
	os.Exit(m.Run())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tool is the command on a root of its own, which must be unmounted at the test's end.
type tool struct {
	t    testing.TB
	root string
	in   io.Reader
}

func newTool(t testing.TB) *tool {
	t.Helper()
	overlaytest.Require(t, "root")
	dir := t.TempDir()
	inMemory(t, dir)
	t.Cleanup(func() {
		points, err := mountPoints()
		must(t, err)
		for p := range points {
			if strings.HasPrefix(p, dir+"/") {
				t.Errorf("still mounted: %s", p)
				must(t, unix.Unmount(p, unix.MNT_DETACH))
			}
		}
	})
	return &tool{t: t, root: filepath.Join(dir, "root")}
}

// inMemory mounts a tmpfs on dir, if this kernel's tmpfs can hold what the images have:
// disks that many tests flush take minutes.
func inMemory(t testing.TB, dir string) {
	t.Helper()
	must(t, unix.Mount("overlay2-test", dir, "tmpfs", 0, ""))
	file := filepath.Join(dir, "probe")
	must(t, os.WriteFile(file, nil, 0o600))
	err := unix.Setxattr(file, "user.probe", []byte("x"), 0) // since Linux 6.6
	must(t, os.Remove(file))
	unmount := func() { must(t, unix.Unmount(dir, 0)) }
	if err != nil {
		unmount()
		return
	}
	t.Cleanup(unmount)
}

// try runs a command and returns its exit code and what it said.
func (o *tool) try(args ...string) (code int, out, errOut string) {
	return o.tryContext(context.Background(), args...)
}

func (o *tool) tryContext(ctx context.Context, args ...string) (code int, out, errOut string) {
	o.t.Helper()
	var stdout, stderr bytes.Buffer
	code = run(ctx, append([]string{"--root", o.root}, args...), o.in, &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

// do runs a command that must end well and returns what it printed, without the last newline.
func (o *tool) do(args ...string) string {
	o.t.Helper()
	code, out, errOut := o.try(args...)
	if code != exitOK || errOut != "" {
		o.t.Fatalf("overlay2 %s: code %d, %q", strings.Join(args, " "), code, errOut)
	}
	return strings.TrimSuffix(out, "\n")
}

// fails runs a command that must end with this code and say this, and nothing on standard output.
func (o *tool) fails(code int, text string, args ...string) {
	o.t.Helper()
	got, out, errOut := o.try(args...)
	if got != code || !strings.Contains(errOut, text) || !strings.HasPrefix(errOut, "overlay2: ") || out != "" {
		o.t.Errorf("overlay2 %s: code %d, not %d; said %q, not %q; printed %q", strings.Join(args, " "), got, code, errOut, text, out)
	}
}

// mount creates a layer on from and mounts it.
func (o *tool) mount(name, from string) string {
	o.t.Helper()
	o.do("create", name, "--from", from)
	return o.do("mount", name)
}

// json runs a command with --json and decodes what it prints.
func (o *tool) json(v any, args ...string) {
	o.t.Helper()
	d := json.NewDecoder(strings.NewReader(o.do(append([]string{"--json"}, args...)...)))
	must(o.t, d.Decode(v))
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		o.t.Errorf("%v: more than one document", args)
	}
}

// empty checks that the root holds no layer, no image and no file but the lock.
func (o *tool) empty() {
	o.t.Helper()
	skeleton := []string{".", "images", "layers", "lock", "overlay2", "overlay2/l", "overlay2/staging", "tmp"}
	err := filepath.WalkDir(o.root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if rel, err := filepath.Rel(o.root, path); err != nil || !slices.Contains(skeleton, rel) {
			o.t.Errorf("left: %s (%v)", rel, err)
		}
		return nil
	})
	must(o.t, err)
}

// same compares two trees.
func same(t testing.TB, first, second string) {
	t.Helper()
	x, totals, err := tree.Read(context.Background(), first)
	must(t, err)
	y, _, err := tree.Read(context.Background(), second)
	must(t, err)
	if totals.Files == 0 {
		t.Error("nothing to compare")
	}
	for _, d := range tree.Diff(x, y) {
		t.Error(d)
	}
}

// change does in a mounted busybox what a container may do.
func change(t testing.TB, dir string) {
	t.Helper()
	script := `set -e
echo more >>/etc/motd; rm /etc/group; mv /etc/passwd /etc/users; chmod 4711 /home/demo/tagged
chown 1234:5678 /usr/local/bin/hello; rm -r /opt/app; mkdir /opt/app; echo x >/opt/app/y
mkdir -p /new/dir; echo one >/new/one; ln /new/one /new/dir/two; ln -s nowhere /new/link
mknod /new/null c 1 3; mkfifo /new/fifo; truncate -s 5M /new/sparse; touch -d '2001-02-03 04:05:06' /new/dir
ln /bin/busybox /new/busybox`
	cmd := exec.Command("chroot", dir, "/bin/sh", "-c", script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("in the container: %v: %s", err, out)
	}
	must(t, unix.Setxattr(filepath.Join(dir, "new/one"), "user.x", []byte("a\x00b"), 0))
	must(t, unix.Setxattr(filepath.Join(dir, "new/sparse"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
}
