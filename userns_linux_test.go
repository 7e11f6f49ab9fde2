package overlay2

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// usernsEnv tells the test binary that it runs in a user namespace that TestUserns made.
const usernsEnv = "OVERLAY2_TEST_IN_USERNS"

// usernsBase is the host's id of the namespace's root.
const usernsBase = 100000

// TestUserns runs tests, this binary's own, as root of a user namespace with a mount namespace:
// what an unprivileged user can have.
func TestUserns(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "userns")
	if os.Getenv(usernsEnv) != "" {
		return
	}
	dir := t.TempDir()
	must(t, os.Chown(dir, usernsBase, usernsBase))
	for parent := dir; parent != "/"; parent = filepath.Dir(parent) {
		st, err := os.Stat(parent)
		must(t, err)
		must(t, os.Chmod(parent, st.Mode()|0o011))
	}
	tests := []string{
		"TestInUserns", "TestMountView", "TestMountAttach", "TestMountDeep",
		"TestGetCommitted", "TestGetErrors", "TestAdopt", "TestStaleMerged", "TestPutFails", "TestManyAtOnce",
		"TestTampered", "TestRemove", "TestTwoDrivers", "TestGetMetadata",
		"TestStressGoroutines", "TestDeepChain", "TestMethodHomeNames", "TestSharedUse",
	}
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run", "^("+strings.Join(tests, "|")+")$")
	cmd.Env = append(os.Environ(), usernsEnv+"=1", "TMPDIR="+dir)
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: usernsBase, Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: ids, GidMappings: ids,
		Credential: &syscall.Credential{}, // root there
	}
	out, err := cmd.CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("--- SKIP")) || !bytes.Contains(out, []byte("--- PASS: TestInUserns")) {
		t.Fatalf("in the user namespace: %v\n%s", err, out)
	}
	// Seen from outside, what the namespace's root made is the mapped user's.
	st, err := os.Lstat(filepath.Join(dir, "kept", "box", "diff", "mine"))
	must(t, err)
	if sys := st.Sys().(*syscall.Stat_t); sys.Uid != usernsBase || sys.Gid != usernsBase+7 {
		t.Errorf("owner %d:%d", sys.Uid, sys.Gid)
	}
}

// TestInUserns is the life of layers as TestUserns runs it.
func TestInUserns(t *testing.T) {
	if os.Getenv(usernsEnv) == "" {
		return // TestUserns runs it where it belongs
	}
	var logged bytes.Buffer
	log := logrus.New()
	log.SetOutput(&logged)
	d := newTestDriver(t, filepath.Join(os.TempDir(), "kept"), Options{Log: logrus.NewEntry(log)})
	if got := statusOf(d, "userxattr"); got != "true" {
		t.Errorf("userxattr: %s", got)
	}
	if got := statusOf(d, "Native Overlay Diff"); got != "true" {
		t.Errorf("native diff: %s", got)
	}
	if _, err := New(t.TempDir(), Options{MountOptions: []string{"metacopy=on"}}); !errors.Is(err, ErrInvalidOption) {
		t.Errorf("metacopy: %v", err)
	}
	apply(t, d, "base", "", makeTar(t, file("etc/", ""), file("etc/gone", "x"), file("etc/stays", "y"), file("hidden/", ""), file("hidden/f", "z"),
		tarEntry{tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}, ""}))
	must(t, d.CreateReadWrite("box", "base", nil))
	path, put := get(t, d, "box")
	if _, err := os.Lstat(path + "/null"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a device: %v", err)
	}
	wantLogged := func(layer string) {
		t.Helper()
		if s := logged.String(); strings.Count(s, "left out") != 1 || !strings.Contains(s, "devices=1") || !strings.Contains(s, "layer="+layer) {
			t.Errorf("logged of the device in %s: %s", layer, s)
		}
		logged.Reset()
	}
	wantLogged("base")
	// Through a mount too, and in a chain.
	device := makeTar(t, tarEntry{tar.Header{Name: "zero", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 5}, ""})
	must(t, d.CreateReadWrite("mounted", "base", nil))
	_, putMounted := get(t, d, "mounted")
	must(t, errOf(d.ApplyDiff("mounted", "base", bytes.NewReader(device))))
	putMounted()
	wantLogged("mounted")
	_, err := d.ApplyLayers("", []LayerDiff{{ID: "alone", Diff: bytes.NewReader(device)}})
	must(t, err)
	wantLogged("alone")
	must(t, errors.Join(d.Remove("mounted"), d.Remove("alone")))
	must(t, errors.Join(os.Remove(path+"/etc/gone"), os.RemoveAll(path+"/hidden"), os.Mkdir(path+"/hidden", 0o755),
		os.WriteFile(path+"/mine", []byte("m"), 0o644), os.Chown(path+"/mine", 0, 7)))
	put()
	want := tree(t, d, "box", overlaytest.NoOverlayXattrs)
	changes, err := d.Changes("box", "base")
	must(t, err)
	var got []string
	for _, c := range changes {
		got = append(got, c.String())
	}
	if s := strings.Join(got, " "); s != "C /etc D /etc/gone C /hidden D /hidden/f A /mine" {
		t.Errorf("changes: %s", s)
	}
	apply(t, d, "copy", "base", readDiff(t, d, "box", "base"))
	_, want, _ = strings.Cut(want, "\n") // but for the root's time, which no diff tells
	_, copied, _ := strings.Cut(tree(t, d, "copy", overlaytest.NoOverlayXattrs), "\n")
	overlaytest.Compare(t, want, copied)
	var st unix.Stat_t
	must(t, unix.Lstat(d.home+"/copy/diff/etc/gone", &st))
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("a whiteout has mode %o", st.Mode)
	}
	size, err := d.DiffSize("box", "base")
	must(t, err)
	if size != 1 {
		t.Errorf("diff of %d bytes", size)
	}
	// The filesystem belongs to another namespace: no mount of it can be mapped from here.
	_, err = d.GetWith("box", MountOpts{IDMap: mapAt(1000)})
	wantErr(t, err, ErrNotSupported)
	if got := statusOf(d, "ID-mapped Mounts"); !strings.HasPrefix(got, "false: ") {
		t.Errorf("mapped mounts: %s", got)
	}
	must(t, d.Remove("copy"))
	if d.Exists("copy") {
		t.Error("removed, and there")
	}
	if problems, err := d.Check(); err != nil || len(problems) > 0 {
		t.Errorf("check: %v %v", problems, err)
	}
	// Diffs for containers with a map of their own, within this namespace.
	m := archive.IDMap{UIDs: []archive.IDRange{{HostID: 1000, Size: 100}}, GIDs: []archive.IDRange{{HostID: 2000, Size: 100}}}
	mapped := openTestDriver(t, filepath.Join(os.TempDir(), "mapped"), Options{IDMap: m})
	apply(t, mapped, "base", "", makeTar(t, tarEntry{tar.Header{Name: "f", Uid: 5, Gid: 6}, ""}))
	must(t, mapped.CreateReadWrite("box", "base", nil))
	path, put = get(t, mapped, "box")
	must(t, unix.Lstat(path+"/f", &st))
	if st.Uid != 1005 || st.Gid != 2006 {
		t.Errorf("owner %d:%d", st.Uid, st.Gid)
	}
	put()
}
