package archive

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// childEnv makes TestUnpackChild, run in a process with other rights, unpack into the
// directory that it names.
const childEnv = "OVERLAY2_TEST_UNPACK_CHILD"

// TestUnpackChild is what the tests below run in a process of its own.
func TestUnpackChild(t *testing.T) {
	dir := os.Getenv(childEnv)
	if dir == "" {
		return
	}
	stream, err := io.ReadAll(os.Stdin)
	if err != nil {
		t.Fatal(err)
	}
	stats, err := Unpack(context.Background(), dir, bytes.NewReader(stream), UnpackOptions{})
	fmt.Fprintf(os.Stdout, "skipped %d size %d error %v\n", stats.SkippedDevices, stats.Size, err)
}

// unpackChild unpacks in a process with attr, started through wrap, and returns what it tells.
func unpackChild(t *testing.T, dir string, stream []byte, attr *syscall.SysProcAttr, wrap ...string) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The binary may lie where only root may go.
	bin := filepath.Join(filepath.Dir(dir), "child.test")
	data, err := os.ReadFile(exe)
	if err == nil {
		err = os.WriteFile(bin, data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	args := append(slices.Clone(wrap), bin, "-test.run", "^TestUnpackChild$", "-test.count", "1")
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	cmd.Dir = "/"
	cmd.Stdin = bytes.NewReader(stream)
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}

// childDir is a directory that everybody can reach, owned by id.
func childDir(t *testing.T, id int) string {
	t.Helper()
	top := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	dir := filepath.Join(top, "root")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, id, id); err != nil {
		t.Fatal(err)
	}
	for _, way := range []string{top, filepath.Dir(top)} {
		if err := os.Chmod(way, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestUnpackUserNamespace: devices that a user namespace may not make are skipped and
// counted, hard links to them as well; all else is there.
func TestUnpackUserNamespace(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs", "userns")
	dir := childDir(t, 100000)
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}
	got := unpackChild(t, dir, mustTar(t, `
dir dev
char dev/null 0666 1:3
block dev/sda 8:0
link dev/zero -> dev/null
fifo dev/p 0622
file f 04755 "x" uid=5 gid=6 user.a="b"
file cap 0755 "x" security.capability="\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
symlink s -> f uid=7
`), &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, Credential: &syscall.Credential{}})
	if want := "skipped 3 size 3 error <nil>"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	want := `"cap" file 0755 100000:100000 size=1 sha256=2d711642b726b044 security.capability="\x01\x00\x00\x03\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xa0\x86\x01\x00"
"dev" dir 0755 100000:100000
"dev/p" fifo 0622 100000:100000
"f" file 4755 100005:100006 size=1 sha256=2d711642b726b044 user.a="b"
"s" symlink 0777 100007:100000 -> "f"
`
	overlaytest.Compare(t, want, overlaytest.Tree(t, dir, overlaytest.NoTimes, overlaytest.NoRoot))
}

// TestUnpackNonRoot: a user without rights can unpack what is his, into directories that
// end up closed to himself.
func TestUnpackNonRoot(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	dir := childDir(t, 1000)
	attr := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000, NoSetGroups: true}}
	got := unpackChild(t, dir, mustTar(t, `
dir ro 0555 uid=1000 gid=1000 user.a="b" mtime=5
file ro/f 0444 "x" uid=1000 gid=1000 user.a="b"
dir none 0000 uid=1000 gid=1000 mtime=6
file none/g 0000 "y" uid=1000 gid=1000 user.c="d"
file other "z" uid=1000 gid=1000
file ro/again "z" uid=1000 gid=1000
file none/again "z" uid=1000 gid=1000
`), attr)
	if want := "skipped 0 size 5 error <nil>"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	want := `"none" dir 0000 1000:1000 mtime=6.000000000
"none/again" file 0644 1000:1000 size=1 mtime=1000000000.000000000 sha256=594e519ae499312b
"none/g" file 0000 1000:1000 size=1 mtime=1000000000.000000000 sha256=a1fce4363854ff88 user.c="d"
"other" file 0644 1000:1000 size=1 mtime=1000000000.000000000 sha256=594e519ae499312b
"ro" dir 0555 1000:1000 mtime=5.000000000 user.a="b"
"ro/again" file 0644 1000:1000 size=1 mtime=1000000000.000000000 sha256=594e519ae499312b
"ro/f" file 0444 1000:1000 size=1 mtime=1000000000.000000000 sha256=2d711642b726b044 user.a="b"
`
	overlaytest.Compare(t, want, overlaytest.Tree(t, dir, overlaytest.NoRoot))
	got = unpackChild(t, dir, mustTar(t, "file foreign \"x\" uid=0"), attr)
	if !strings.Contains(got, `unpack "foreign": chown to 0:0: operation not permitted`) {
		t.Error(got)
	}
}

// TestUnpackUmask: modes are exact whatever the umask.
func TestUnpackUmask(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	dir := childDir(t, 0)
	got := unpackChild(t, dir, mustTar(t, "dir d 0777\nfile d/f 0666 \"x\"\nfifo d/p 0622\nchar d/c 0666 1:3\nfile a/b/c \"x\""), nil, "sh", "-c", `umask 077; exec "$0" "$@"`)
	if want := "skipped 0 size 2 error <nil>"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	want := `"a" dir 0755 0:0
"a/b" dir 0755 0:0
"a/b/c" file 0644 0:0 size=1 sha256=2d711642b726b044
"d" dir 0777 0:0
"d/c" char 0666 0:0 1:3
"d/f" file 0666 0:0 size=1 sha256=2d711642b726b044
"d/p" fifo 0622 0:0
`
	overlaytest.Compare(t, want, overlaytest.Tree(t, dir, overlaytest.NoTimes, overlaytest.NoRoot))
}

// TestUnpackGNUTar reads what GNU tar writes in all its formats.
func TestUnpackGNUTar(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs", "cmd:tar")
	top := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	src := filepath.Join(top, "src")
	long := strings.Repeat("long-name/", 9) + "f"
	plain := "dir d 02755 mtime=5\nfile d/f \"x\" uid=3\nfile e 04755 \"y\" mtime=7\nsymlink s -> d/f\nlink l -> e\nfifo p\nchar c 1:3\nfile " + long + " \"z\"\n"
	rich := plain + "file " + strings.Repeat("very-", 40) + "long \"q\"\nfile big uid=3000000 gid=2500000 \"x\"\nsymlink s2 -> " + strings.Repeat("t", 180) + "\n"
	posix := rich + "file ns \"x\" mtime=9.123456789\nfile old \"x\" mtime=-5.5\nfile x \"x\" user.a=\"b\" trusted.c=\"d\"\nfile \"n\u00f6n \\n ascii\" \"x\"\n"
	sparse := "file holes size=20M data=1M:\"one\" data=15M:\"two\"\nfile hole size=3M\nfile many size=40M"
	for i := range 40 {
		sparse += fmt.Sprintf(" data=%dK:\"x\"", i*1000)
	}
	for name, c := range map[string]struct {
		tree string
		args []string
	}{
		"v7":           {"dir d mtime=5\nfile d/f \"x\" uid=3\nsymlink s -> d/f\nfile e \"x\"\nlink l -> e\n", []string{"--format=v7"}},
		"ustar":        {plain, []string{"--format=ustar"}},
		"gnu":          {rich, []string{"--format=gnu"}},
		"oldgnu":       {rich, []string{"--format=oldgnu"}},
		"posix":        {posix, []string{"--format=posix", "--xattrs", "--xattrs-include=*"}},
		"sparse-gnu":   {sparse, []string{"--format=gnu", "-S"}},
		"sparse-0.0":   {sparse, []string{"--format=posix", "-S", "--sparse-version=0.0"}},
		"sparse-0.1":   {sparse, []string{"--format=posix", "-S", "--sparse-version=0.1"}},
		"sparse-1.0":   {sparse, []string{"--format=posix", "-S", "--sparse-version=1.0"}},
		"global":       {plain, []string{"--format=posix", "--pax-option=globexthdr.name=g,comment=x"}},
		"large record": {plain, []string{"-b", "2000"}},
	} {
		t.Run(name, func(t *testing.T) {
			from, to := filepath.Join(src, name), filepath.Join(top, "to-"+name)
			overlaytest.Build(t, from, c.tree)
			if err := os.Mkdir(to, 0o755); err != nil {
				t.Fatal(err)
			}
			var out, stderr bytes.Buffer
			cmd := exec.Command("tar", append(c.args, "-C", from, "--sort=name", "--numeric-owner", "-cf", "-", ".")...)
			cmd.Stdout, cmd.Stderr = &out, &stderr
			if err := cmd.Run(); err != nil {
				t.Fatal(err, stderr.String())
			}
			mustUnpack(t, to, out.Bytes(), UnpackOptions{})
			overlaytest.Compare(t, overlaytest.Tree(t, from), overlaytest.Tree(t, to))
			if strings.HasPrefix(name, "sparse") {
				if usage := bytesOnDisk(t, to); usage > 2<<20 {
					t.Errorf("%d bytes on disk", usage)
				}
			}
		})
	}
}

// bytesOnDisk returns the bytes that the files in dir take.
func bytesOnDisk(t *testing.T, dir string) (sum int64) {
	t.Helper()
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range names {
		var st syscall.Stat_t
		if err := syscall.Lstat(filepath.Join(dir, e.Name()), &st); err != nil {
			t.Fatal(err)
		}
		sum += st.Blocks * 512
	}
	return sum
}
