package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/cmd/overlay2/internal/image"
	"golang.org/x/sys/unix"
)

func TestExitCodes(t *testing.T) {
	o := newTool(t)
	o.fails(exitUsage, "unknown command", "frobnicate")
	o.fails(exitUsage, "unknown flag", "ls", "--frobnicate")
	o.fails(exitUsage, "accepts 1 arg", "import")
	o.fails(exitUsage, "unknown command", "ls", "x")
	o.fails(exitUsage, "root is empty", "--root", "", "ls")
	o.fails(exitUsage, "unknown type", "import", shipped, "--type", "zip")
	o.fails(exitUsage, "not of the form", "import", shipped, "--platform", "a/b/c/d")
	o.fails(exitUsage, "invalid name", "import", shipped, "--name", "../x")
	o.fails(exitUsage, "invalid name", "create", "../x")
	o.fails(exitUsage, "invalid name", "create", "")
	o.fails(exitUsage, "needs a --name", "commit", "x")
	o.fails(exitUsage, "needs --to", "export", "x")
	o.fails(exitUsage, "unknown compression", "export", "x", "--to", "y", "--compress", "xz")
	o.fails(exitNotFound, "no such file", "import", "/nowhere/at/all")
	for _, args := range [][]string{{"mount", "x"}, {"umount", "x"}, {"changes", "x"}, {"diff", "x"}, {"rm", "x"}, {"export", "x", "--to", "y"}, {"commit", "x", "--name", "y"}, {"check"}, {"repair"}} {
		o.fails(exitNotFound, "not found", args...) // no root at all
	}
	o.do("import", shipped, "--name", "a")
	for _, args := range [][]string{{"mount", "x"}, {"umount", "x"}, {"changes", "x"}, {"diff", "x"}, {"rm", "x"}, {"export", "x", "--to", "y"}, {"commit", "x", "--name", "y"}, {"create", "y", "--from", "x"}} {
		o.fails(exitNotFound, "not found", args...)
	}
	o.do("create", "box", "--from", "a")
	o.fails(exitConflict, "exists already", "create", "box", "--from", "a")
	o.fails(exitConflict, "in use", "rm", "a")
	o.fails(exitFailure, "not mounted", "umount", "box")
	o.do("mount", "box")
	o.fails(exitConflict, "it is mounted", "rm", "box")
	o.fails(exitConflict, "not empty", "export", "a", "--to", o.root)
	var l listing
	o.json(&l, "ls")
	o.fails(exitConflict, "in use", "rm", l.Images[0].Layers[0])
	o.fails(exitFailure, "nothing to commit", "commit", l.Images[0].Layers[0], "--name", "x")
	o.fails(exitUsage, "invalid name", "create", l.Images[0].Layers[0])
	o.do("rm", "-f", "box")
	o.do("rm", "a")
	o.empty()
}

// keys returns the names in a JSON document, "[]" for the elements of lists.
func keys(v any, prefix string, into map[string]bool) {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			into[prefix+k] = true
			keys(e, prefix+k+".", into)
		}
	case []any:
		for _, e := range v {
			keys(e, prefix, into)
		}
	}
}

// The shapes of --json are a promise to scripts.
func TestJSONShapes(t *testing.T) {
	o := newTool(t)
	out := filepath.Join(t.TempDir(), "out")
	file := filepath.Join(t.TempDir(), "x.tar")
	for _, c := range []struct {
		args string
		want string
	}{
		{"import " + shipped + " --name a", "images images.id images.layers images.layers.diffID images.layers.id images.layers.new images.layers.size images.name"},
		{"create box --from a", "config created id image kind parent"},
		{"mount box", "id path"},
		{"changes box", "changes id"},
		{"diff box -o " + file, "bytes file id"},
		{"commit box --name b", "id layers layers.diffID layers.id layers.new layers.size name"},
		{"ls", "images images.id images.imported images.layers images.name images.size layers layers.created layers.diffID layers.id layers.image layers.kind layers.mounted layers.parent layers.paths layers.size"},
		{"tree", "children children.children children.children.children children.children.children.children children.children.children.children.children"},
		{"info", "driver images layers root status version"},
		{"check", "problems"},
		{"repair", "actions problems"},
		{"export b --to " + out, "id layers manifest name repacked to"},
		{"verify --record a", "layers layers.id layers.status"},
		{"verify a", "layers layers.id layers.status"},
		{"compare " + o.root + " " + o.root, "bytes differences directories files others symlinks"},
		{"umount box", "id"},
		{"rm box a b", "removed"},
	} {
		var v any
		o.json(&v, strings.Fields(c.args)...)
		got := map[string]bool{}
		keys(v, "", got)
		for _, k := range strings.Fields(c.want) {
			if !got[k] {
				t.Errorf("%s: no %s", c.args, k)
			}
			delete(got, k)
		}
		for k := range got {
			if !strings.HasPrefix(k, "status.") && !strings.HasPrefix(k, "children.") && !strings.HasPrefix(c.args, "tree") {
				t.Errorf("%s: has %s, which nobody was promised", c.args, k)
			}
		}
	}
	// Lists are lists when they are empty, too.
	for cmd, list := range map[string]string{"ls": "layers", "check": "problems", "repair": "actions"} {
		var v map[string]any
		o.json(&v, cmd)
		if l, ok := v[list].([]any); !ok || len(l) != 0 {
			t.Errorf("%s: %s is %v", cmd, list, v[list])
		}
	}
	o.empty()
}

func TestMounts(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "a")
	box := o.mount("box", "a")
	if again := o.do("mount", "box"); again != box {
		t.Errorf("the second time at %s", again)
	}
	at := t.TempDir()
	if got := o.do("mount", "box", at); got != at {
		t.Errorf("at %s", got)
	}
	o.do("mount", "box", at)
	same(t, box, at)
	if !strings.Contains(o.do("ls"), "mounted") || !strings.Contains(o.do("tree"), "box  read-write, mounted") {
		t.Error("not shown as mounted")
	}
	o.fails(exitNotFound, "no such file", "mount", "box", filepath.Join(at, "nowhere"))
	o.do("umount", "box")
	if points, err := mountPoints(); err != nil || points[box] || points[at] {
		t.Error("still mounted")
	}
	// An image's layer is there to be looked at only.
	var l listing
	o.json(&l, "ls")
	top := l.Images[0].Layers[4]
	dir := o.do("mount", top[:12])
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("written to an image's layer: %v", err)
	}
	o.do("umount", top)
	o.do("rm", "box", "a")
	o.empty()
}

// process starts the tool as a process of its own.
func (o *tool) process(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], append([]string{"--root", o.root}, args...)...)
	cmd.Env = append(os.Environ(), helperVariable+"=1")
	return cmd
}

// bigSource is an image whose second layer takes a while.
func bigSource(t *testing.T) string {
	var pairs []string
	for i := range 6000 {
		pairs = append(pairs, fmt.Sprintf("many/%d", i), strings.Repeat("content ", 100))
	}
	pairs = append(pairs, "big", strings.Repeat("x", 8<<20))
	return ociSource(t, image.CompressNone, [][]byte{tarOf(t, "first", "1"), tarOf(t, pairs...)}, nil).dir(t)
}

// pending waits until a layer is being filled.
func (o *tool) pending() {
	o.t.Helper()
	for range 2000 {
		var l listing
		code, out, _ := o.try("--json", "ls")
		if code == exitOK {
			must(o.t, json.Unmarshal([]byte(out), &l))
			if len(l.Layers) == 2 && slices.ContainsFunc(l.Layers, func(s listedLayer) bool { return s.Pending }) {
				return
			}
		}
		time.Sleep(2 * time.Millisecond)
	}
	o.t.Fatal("the second layer is never begun")
}

func TestInterruptedImport(t *testing.T) {
	o := newTool(t)
	path := bigSource(t)
	cmd := o.process("import", path, "--name", "x")
	var said bytes.Buffer
	cmd.Stderr = &said
	must(t, cmd.Start())
	o.pending()
	must(t, cmd.Process.Signal(os.Interrupt))
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitInterrupted || !strings.Contains(said.String(), "context canceled") {
		t.Errorf("%v: %s", err, said.String())
	}
	o.do("check")
	o.empty()
}

// A kill leaves an unfinished layer: check says so, another import finishes it, rm removes it.
func TestKilledImport(t *testing.T) {
	for _, after := range []string{"import", "rm"} {
		o := newTool(t)
		path := bigSource(t)
		cmd := o.process("import", path, "--name", "x")
		must(t, cmd.Start())
		o.pending()
		must(t, cmd.Process.Kill())
		if err := cmd.Wait(); err == nil {
			t.Fatal("it was quicker than the kill")
		}
		code, out, said := o.try("check")
		if code != exitFailure || !strings.Contains(out, "never finished") || !strings.Contains(said, "problems found") {
			t.Errorf("check: code %d: %s%s", code, out, said)
		}
		var l listing
		o.json(&l, "ls")
		i := slices.IndexFunc(l.Layers, func(s listedLayer) bool { return s.Pending })
		o.fails(exitNotFound, "never finished", "mount", l.Layers[i].ID)
		o.fails(exitNotFound, "never finished", "create", "y", "--from", l.Layers[i].ID)
		if after == "import" {
			o.do("import", path, "--name", "x")
			o.do("check")
			dir := o.mount("box", "x")
			if st, err := os.Stat(filepath.Join(dir, "big")); err != nil || st.Size() != 8<<20 {
				t.Errorf("%v, %v", st, err)
			}
			o.do("rm", "-f", "box")
			o.do("rm", "x")
		} else {
			o.do("rm", l.Layers[i].ID)
			o.do("rm", l.Layers[1-i].ID)
		}
		o.do("check")
		o.empty()
	}
}

// Mounted by one process, used and unmounted by others.
func TestMountOutlivesProcess(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "a")
	o.do("create", "box", "--from", "a")
	out, err := o.process("mount", "box").Output()
	must(t, err)
	dir := strings.TrimSpace(string(out))
	must(t, os.WriteFile(filepath.Join(dir, "x"), nil, 0o600))
	if got, err := o.process("changes", "box").Output(); err != nil || string(got) != "A /x\n" {
		t.Errorf("%q, %v", got, err)
	}
	must(t, o.process("umount", "box").Run())
	if points, err := mountPoints(); err != nil || points[dir] {
		t.Error("still mounted")
	}
}

// Many at the same time wait for each other and end well.
func TestManyProcesses(t *testing.T) {
	o := newTool(t)
	var started []*exec.Cmd
	for i := range 6 {
		cmd := o.process("--quiet", "import", shipped, "--name", fmt.Sprint("name", i))
		var said bytes.Buffer
		cmd.Stderr = &said
		must(t, cmd.Start())
		started = append(started, cmd)
	}
	for _, cmd := range started {
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, cmd.Stderr)
		}
	}
	var l listing
	o.json(&l, "ls")
	if len(l.Images) != 6 || len(l.Layers) != 5 {
		t.Errorf("%d images, %d layers", len(l.Images), len(l.Layers))
	}
	o.do("check")
	o.do("rm", "name0", "name1", "name2", "name3", "name4", "name5")
	o.empty()
}

// A tar for a terminal is refused. The other side of a pty stands for the person.
func TestTerminal(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "a")
	o.do("create", "box", "--from", "a")
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	defer master.Close()
	must(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	must(t, err)
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	defer terminal.Close()
	must(t, unix.IoctlSetWinsize(int(terminal.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 100}))
	for _, args := range [][]string{{"diff", "box"}, {"export", "a", "--to", "-"}} {
		var said bytes.Buffer
		if code := run(context.Background(), append([]string{"--root", o.root}, args...), nil, terminal, &said); code != exitUsage || !strings.Contains(said.String(), "not for a terminal") {
			t.Errorf("%v: code %d, %s", args, code, said.String())
		}
	}
	// Progress goes to a terminal, and nowhere else; --quiet and --json keep standard output clean anyway.
	seen := make(chan string, 1)
	go func() {
		b := make([]byte, 1<<16)
		n := 0
		for n < len(b) && !bytes.Contains(b[:n], []byte("END")) {
			m, err := master.Read(b[n:])
			if n += m; err != nil {
				break
			}
		}
		seen <- string(b[:n])
	}()
	var out bytes.Buffer
	if code := run(context.Background(), []string{"--root", o.root, "--json", "import", bigSource(t), "--name", "big"}, nil, &out, terminal); code != exitOK {
		t.Error(code)
	}
	_, err = io.WriteString(terminal, "END")
	must(t, err)
	if s := <-seen; !strings.Contains(s, "layer 2/2") || !strings.Contains(s, "%") {
		t.Errorf("no progress: %q", s)
	}
	if !json.Valid(out.Bytes()) {
		t.Errorf("not JSON: %s", out.String())
	}
}

// Damage is told, and the records' too.
func TestCheckFindsDamage(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "a")
	o.do("create", "box", "--from", "a")
	must(t, os.WriteFile(filepath.Join(o.root, "overlay2/box/link"), []byte("../../../../../etc/passwd"), 0o644))
	code, out, _ := o.try("check")
	if code != exitFailure || !strings.Contains(out, "box") {
		t.Errorf("code %d: %s", code, out)
	}
	code, _, said := o.try("mount", "box")
	if code == exitOK || !strings.Contains(said, "box") {
		t.Errorf("mounted a damaged layer: %s", said)
	}
	o.do("rm", "box")
	o.do("create", "lost", "--from", "a")
	must(t, os.RemoveAll(filepath.Join(o.root, "overlay2/lost")))
	if code, out, _ := o.try("check"); code != exitFailure || !strings.Contains(out, "lost: recorded, but the layer is gone") {
		t.Errorf("code %d: %s", code, out)
	}
	o.do("rm", "lost")
	o.try("check")
	o.do("rm", "a")
}

func TestCompare(t *testing.T) {
	o := newTool(t)
	a, b := t.TempDir(), t.TempDir()
	if got := o.do("compare", a, b); !strings.HasPrefix(got, "equal: 0 files") {
		t.Error(got)
	}
	must(t, os.WriteFile(filepath.Join(b, "x"), nil, 0o600))
	code, out, said := o.try("compare", a, b)
	if code != exitFailure || out != "\"x\": only in the second\n" || !strings.Contains(said, "1 differences found") {
		t.Errorf("code %d: %s%s", code, out, said)
	}
}

func TestHelp(t *testing.T) {
	o := newTool(t)
	for _, cmd := range (&app{}).command().Commands() {
		help := o.do(cmd.Name(), "--help")
		if !strings.Contains(help, cmd.Use) {
			t.Errorf("%s: %s", cmd.Name(), help)
		}
	}
	top := o.do("--help")
	if !strings.Contains(top, "Exit codes") || strings.Contains(top, "\n  compare ") {
		t.Error(top)
	}
	if o.do() != top {
		t.Error("no arguments: not the help")
	}
}

func TestSourceDateEpoch(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "86400")
	var ids []string
	for range 2 {
		o := newTool(t)
		o.do("import", shipped, "--name", "a")
		box := o.mount("box", "a")
		must(t, os.Remove(filepath.Join(box, "etc/motd")))
		when := unix.NsecToTimespec(5e9)
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(box, "etc"), []unix.Timespec{when, when}, 0))
		var r imported
		o.json(&r, "commit", "box", "--name", "b")
		ids = append(ids, r.ID)
		o.do("umount", "box")
	}
	if !reflect.DeepEqual(ids[0], ids[1]) {
		t.Errorf("two ids for the same commit: %v", ids)
	}
}

// A layer that is written to while it is committed gives an error that says so, or an image
// that is whole; never one in between.
func TestCommitWhileWriting(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "a")
	box := o.mount("box", "a")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := os.WriteFile(filepath.Join(box, "etc/busy"), bytes.Repeat([]byte{byte(i)}, 1<<16), 0o600); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for i := range 3 {
		code, _, said := o.try("commit", "box", "--name", fmt.Sprint("image", i))
		if code != exitOK && (code != exitFailure || !strings.Contains(said, "changed while it was read")) {
			t.Errorf("code %d: %s", code, said)
		}
		o.do("check")
		if code == exitOK {
			o.do("rm", fmt.Sprint("image", i))
		}
	}
	close(stop)
	<-stopped
	o.do("rm", "-f", "box")
	o.do("rm", "a")
	o.empty()
}

// TestLongMountinfo: a line of the mount table that is longer than 64 KiB disturbs no command.
func TestLongMountinfo(t *testing.T) {
	o := newTool(t)
	dir := t.TempDir()
	must(t, unix.Mount("long", dir, "tmpfs", 0, ""))
	defer func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	must(t, err)
	defer unix.Close(fd)
	for i := range 400 {
		lower := filepath.Join(dir, strings.Repeat("d/", 90), strings.Repeat("x", 20), strconv.Itoa(i))
		must(t, os.MkdirAll(lower, 0o700))
		if err := unix.FsconfigSetString(fd, "lowerdir+", lower); err != nil {
			t.Logf("the kernel mounts no chain with names of such length: %v", err)
			return
		}
	}
	must(t, unix.FsconfigCreate(fd))
	mnt, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	must(t, err)
	must(t, os.Mkdir(filepath.Join(dir, "a b"), 0o700))
	must(t, unix.MoveMount(mnt, "", unix.AT_FDCWD, filepath.Join(dir, "a b"), unix.MOVE_MOUNT_F_EMPTY_PATH))
	must(t, unix.Close(mnt))
	data, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if longest := slices.MaxFunc(strings.Split(string(data), "\n"), func(a, b string) int { return len(a) - len(b) }); len(longest) <= 64<<10 {
		t.Fatalf("the longest line has %d bytes", len(longest))
	}
	if points, err := mountPoints(); err != nil || !points[filepath.Join(dir, "a b")] {
		t.Errorf("%v", err)
	}
	o.do("import", shipped, "--name", "a")
	path := o.mount("box", "a")
	if points, err := mountPoints(); err != nil || !points[path] {
		t.Errorf("%v", err)
	}
	o.do("ls")
	o.do("umount", "box")
	o.do("rm", "box", "a")
	o.empty()
}

// Where mounts are shared, as systemd makes them, the driver mounts its home on itself.
// The last command that unmounts something takes that away, too.
func TestSharedMounts(t *testing.T) {
	o := newTool(t)
	dir := filepath.Dir(o.root)
	must(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	defer func() { must(t, unix.Unmount(dir, 0)) }()
	must(t, unix.Mount("", dir, "", unix.MS_SHARED, ""))
	o.do("import", shipped, "--name", "a")
	box := o.mount("box", "a")
	o.mount("other", "a")
	o.do("umount", "box")
	if points, err := mountPoints(); err != nil || points[box] || !points[filepath.Join(o.root, "overlay2")] {
		t.Error("the home is not private while a layer is mounted")
	}
	o.do("umount", "other")
	if points, err := mountPoints(); err != nil || points[filepath.Join(o.root, "overlay2")] {
		t.Error("the home is still mounted on itself")
	}
	o.do("rm", "box", "other", "a")
	o.empty()
}
