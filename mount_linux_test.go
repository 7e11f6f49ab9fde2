package overlay2

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

func TestMountSpecData(t *testing.T) {
	s := mountSpec{
		home: "/h", lowers: []string{"l/A", "l/B"}, upper: "l/C", work: "l/C/../work",
		options: []string{"index=off", "userxattr"}, label: "u:r:t:s0:c1,c2",
	}
	for prefix, want := range map[string]string{
		"":                `lowerdir=l/A:l/B,upperdir=l/C,workdir=l/C/../work,index=off,userxattr,context="u:r:t:s0:c1,c2"`,
		"/h/":             `lowerdir=/h/l/A:/h/l/B,upperdir=/h/l/C,workdir=/h/l/C/../work,index=off,userxattr,context="u:r:t:s0:c1,c2"`,
		`/a,b:c\d,lower=`: `lowerdir=/a\,b\:c\\d\,lower=l/A:/a\,b\:c\\d\,lower=l/B,upperdir=/a\,b\:c\\d\,lower=l/C,workdir=/a\,b\:c\\d\,lower=l/C/../work,index=off,userxattr,context="u:r:t:s0:c1,c2"`,
	} {
		if got := s.data(prefix); got != want {
			t.Errorf("%q:\n%s\nwant\n%s", prefix, got, want)
		}
	}
	ro := mountSpec{lowers: []string{"l/A", "l/B"}}
	if got := ro.data(""); got != "lowerdir=l/A:l/B" {
		t.Error(got)
	}
}

// TestMountTooLong: mount(2) cuts longer data silently and mounts the wrong layers.
func TestMountTooLong(t *testing.T) {
	name := strings.Repeat("x", os.Getpagesize()/300) // with pages of 64 KiB, links are never too long
	s := mountSpec{home: t.TempDir(), lowers: strings.Split(strings.Repeat(name+":", 300)+name, ":")}
	err := s.mount("merged", MountLegacy, facts{})
	if !errors.Is(err, ErrMountTooLong) || !strings.Contains(err.Error(), "301 layers") {
		t.Errorf("got %v", err)
	}
	if err := sys.MountOverlay("/nowhere", strings.Repeat("x", os.Getpagesize()), 0); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("got %v", err)
	}
}

func TestGetPut(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		d := newTestDriver(t, dir, Options{})
		must(t, d.Create("base", "", nil))
		path, put := get(t, d, "base")
		if path != dir+"/base/diff" {
			t.Errorf("a base layer is at %s", path)
		}
		overlaytest.Build(t, path, "file etc/f \"base\"\ndir var/d")
		put()
		must(t, d.Create("mid", "base", nil))
		fill(t, d, "mid", `file etc/g "mid"`)
		must(t, d.CreateReadWrite("top", "mid", nil))
		path, put = get(t, d, "top")
		if path != dir+"/top/merged" {
			t.Errorf("top is at %s", path)
		}
		must(t, os.WriteFile(path+"/etc/f", []byte("changed"), 0o600))
		must(t, os.Remove(path+"/var/d"))
		again, put2 := get(t, d, "top")
		if again != path {
			t.Errorf("another Get: %s", again)
		}
		put()
		if data, err := os.ReadFile(path + "/etc/f"); err != nil || string(data) != "changed" {
			t.Errorf("after the first of two Puts: %q %v", data, err)
		}
		put2()
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("merged stays: %v", err)
		}
		wantErr(t, d.Put("top"), ErrNotMounted)
		// The layers below are as they were.
		if data, err := os.ReadFile(dir + "/base/diff/etc/f"); err != nil || string(data) != "base" {
			t.Errorf("the base changed: %q %v", data, err)
		}
	})
}

// TestGetCommitted: in peers a base layer with children is writable through Get.
func TestGetCommitted(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	fill(t, d, "base", `file f "x"`)
	must(t, d.Create("mid", "base", nil))
	fill(t, d, "mid", `file g "y"`)
	must(t, d.Create("top", "mid", nil))
	for _, id := range []string{"base", "mid"} {
		path, put := get(t, d, id)
		if err := os.WriteFile(path+"/f", nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("%s can be written: %v", id, err)
		}
		if data, err := os.ReadFile(path + "/f"); err != nil || string(data) != "x" {
			t.Errorf("%s: %q %v", id, data, err)
		}
		put()
	}
}

func TestGetErrors(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	_, err := d.Get("none", "")
	wantErr(t, err, ErrLayerNotFound)
	wantErr(t, d.Put("none"), ErrLayerNotFound)
	must(t, d.Create("base", "", nil))
	wantErr(t, d.Put("base"), ErrNotMounted)
	must(t, d.CreateReadWrite("box", "base", nil))
	_, err = d.Get("box", `a",upperdir=/etc,x="`)
	wantErr(t, err, ErrInvalidOption)
	// A kernel without SELinux refuses the option: the label is not dropped silently.
	if on, _ := os.ReadFile("/sys/fs/selinux/enforce"); len(on) == 0 {
		_, err = d.Get("box", "system_u:object_r:container_file_t:s0:c1,c2")
		wantErr(t, err, unix.EINVAL)
	}
	if _, err := os.Lstat(d.home + "/box/merged"); !errors.Is(err, os.ErrNotExist) {
		t.Error("a Get that failed leaves merged")
	}
	_, put := get(t, d, "box")
	put()
}

// TestTampered: no file of a home, whatever it holds, makes the driver mount, touch or follow
// anything else than a layer.
func TestTampered(t *testing.T) {
	for name, tamper := range map[string]func(t *testing.T, home string){
		"lower empty":            func(t *testing.T, home string) { write(t, home+"/box/lower", "") },
		"lower absolute":         func(t *testing.T, home string) { write(t, home+"/box/lower", "/etc") },
		"lower dot dot":          func(t *testing.T, home string) { write(t, home+"/box/lower", "l/../../etc") },
		"lower empty element":    func(t *testing.T, home string) { appendTo(t, home+"/box/lower", "::") },
		"lower newline":          func(t *testing.T, home string) { appendTo(t, home+"/box/lower", "\n") },
		"lower short":            func(t *testing.T, home string) { write(t, home+"/box/lower", "l/ABC") },
		"lower option":           func(t *testing.T, home string) { appendTo(t, home+"/box/lower", ",upperdir=/etc") },
		"lower dangling":         func(t *testing.T, home string) { write(t, home+"/box/lower", "l/"+linkA) },
		"lower huge":             func(t *testing.T, home string) { write(t, home+"/box/lower", strings.Repeat("l/"+linkA+":", 10000)) },
		"lower fifo":             func(t *testing.T, home string) { replace(t, home+"/box/lower", fifo) },
		"lower directory":        func(t *testing.T, home string) { replace(t, home+"/box/lower", directory) },
		"lower symlink":          func(t *testing.T, home string) { replace(t, home+"/box/lower", symlink("../base/link")) },
		"link empty":             func(t *testing.T, home string) { write(t, home+"/box/link", "") },
		"link dot dot":           func(t *testing.T, home string) { write(t, home+"/box/link", "..") },
		"link path":              func(t *testing.T, home string) { write(t, home+"/box/link", "../../../../../../../../../etc") },
		"link newline":           func(t *testing.T, home string) { appendTo(t, home+"/box/link", "\n") },
		"link dangling":          func(t *testing.T, home string) { write(t, home+"/box/link", linkA) },
		"link of another layer":  func(t *testing.T, home string) { copyFile(t, home+"/base/link", home+"/box/link") },
		"link missing":           func(t *testing.T, home string) { must(t, os.Remove(home+"/box/link")) },
		"link fifo":              func(t *testing.T, home string) { replace(t, home+"/box/link", fifo) },
		"l entry to etc":         func(t *testing.T, home string) { replaceLink(t, home, "base", "/etc") },
		"l entry to outside":     func(t *testing.T, home string) { replaceLink(t, home, "base", "../../outside/diff") },
		"l entry to a directory": func(t *testing.T, home string) { replace(t, linkPath(t, home, "base"), directory) },
		"l entry missing":        func(t *testing.T, home string) { must(t, os.Remove(linkPath(t, home, "base"))) },
		"l symlink":              func(t *testing.T, home string) { swapDir(t, home+"/l", symlink("/etc")) },
		"parent gone":            func(t *testing.T, home string) { must(t, os.Rename(home+"/base", home+"/gone")) },
		"parent symlink":         func(t *testing.T, home string) { swapDir(t, home+"/base", symlink("/etc")) },
		"parent's diff symlink":  func(t *testing.T, home string) { swapDir(t, home+"/base/diff", symlink("/etc")) },
		"parent's diff missing":  func(t *testing.T, home string) { must(t, os.RemoveAll(home+"/base/diff")) },
		"layer symlink":          func(t *testing.T, home string) { swapDir(t, home+"/box", symlink("/etc")) },
		"diff symlink":           func(t *testing.T, home string) { swapDir(t, home+"/box/diff", symlink("/etc")) },
		"diff missing":           func(t *testing.T, home string) { must(t, os.RemoveAll(home+"/box/diff")) },
		"diff file": func(t *testing.T, home string) {
			must(t, os.RemoveAll(home+"/box/diff"))
			write(t, home+"/box/diff", "")
		},
		"work symlink":   func(t *testing.T, home string) { swapDir(t, home+"/box/work", symlink("/etc")) },
		"merged symlink": func(t *testing.T, home string) { must(t, os.Symlink("/etc", home+"/box/merged")) },
		"merged file":    func(t *testing.T, home string) { write(t, home+"/box/merged", "") },
	} {
		t.Run(name, func(t *testing.T) {
			overlaytest.Require(t, "root", "overlay")
			overlaytest.NoLeaks(t)
			dir := t.TempDir()
			d, err := New(dir+"/home", Options{})
			must(t, err)
			must(t, os.MkdirAll(dir+"/outside/diff", 0o755))
			write(t, dir+"/outside/diff/canary", "outside")
			must(t, d.Create("base", "", nil))
			must(t, d.CreateReadWrite("box", "base", nil))
			must(t, d.CreateReadWrite("bystander", "", nil))
			must(t, d.Sync()) // later it would remove its record
			d.trash.wait()
			tamper(t, d.home)
			before := overlaytest.Tree(t, dir)
			path, err := d.Get("box", "")
			wantErr(t, err, ErrCorrupt)
			if path != "" {
				t.Errorf("mounted at %s", path)
			}
			if le := (*LayerError)(nil); !errors.As(err, &le) || le.ID != "box" {
				t.Errorf("the layer is not named: %v", err)
			}
			_, _ = d.GetMetadata("box")
			_ = d.Create("child", "box", nil)
			must(t, d.Remove("child"))
			_, _ = d.Changes("box", "base")
			_, _ = d.DiffSize("box", "base")
			must(t, d.Cleanup())
			overlaytest.Compare(t, withoutCommitted(before), withoutCommitted(overlaytest.Tree(t, dir, 0)))
			problems, err := d.Check()
			if err == nil && len(problems) == 0 {
				t.Error("check finds nothing")
			}
			for _, p := range problems {
				if p.ID == "bystander" {
					t.Errorf("check blames another layer: %v", p)
				}
			}
			_ = d.Remove("box")
			must(t, d.Cleanup())
			if !d.Exists("bystander") {
				t.Error("another layer is lost")
			}
			if data, err := os.ReadFile(dir + "/outside/diff/canary"); err != nil || string(data) != "outside" {
				t.Errorf("touched outside: %v", err)
			}
		})
	}
}

// withoutCommitted drops what an allowed Create and Remove leave: times of directories, a committed marker and the list of children.
func withoutCommitted(tree string) string {
	var b strings.Builder
	for line := range strings.Lines(tree) {
		if strings.Contains(line, "/committed\" ") || strings.Contains(line, "/listed\" ") || strings.Contains(line, "/children\" ") {
			continue
		}
		words := strings.Fields(line)
		if len(words) > 1 && words[1] == "dir" {
			line = strings.Join(words[:4], " ") + "\n"
		}
		b.WriteString(line)
	}
	return b.String()
}

func write(t *testing.T, path, content string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte(content), 0o644))
}

func appendTo(t *testing.T, path, content string) {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	write(t, path, string(data)+content)
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	must(t, err)
	write(t, to, string(data))
}

func fifo(path string) error      { return unix.Mkfifo(path, 0o600) }
func directory(path string) error { return os.Mkdir(path, 0o700) }
func symlink(target string) func(string) error {
	return func(path string) error { return os.Symlink(target, path) }
}

// replace removes a file and puts something else in its place.
func replace(t *testing.T, path string, put func(string) error) {
	t.Helper()
	must(t, os.Remove(path))
	must(t, put(path))
}

// swapDir moves a directory out of the way and puts something else in its place.
func swapDir(t *testing.T, path string, put func(string) error) {
	t.Helper()
	must(t, os.RemoveAll(path))
	must(t, put(path))
}

// linkPath returns where the link of a layer lies.
func linkPath(t *testing.T, home, id string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(home, id, "link"))
	must(t, err)
	return filepath.Join(home, "l", string(data))
}

func replaceLink(t *testing.T, home, id, target string) {
	t.Helper()
	replace(t, linkPath(t, home, id), symlink(target))
}

// TestAdopt: mounts that a process left count as one Get, and its Put may be the first call of the next.
func TestAdopt(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	must(t, d.CreateReadWrite("box2", "base", nil))
	must(t, d.Create("child", "box2", nil))
	_, err := d.Get("box", "")
	must(t, err)
	_, err = d.Get("box2", "")
	must(t, err)
	// base is committed and has no lower: its mount is a bind mount.
	_, err = d.Get("base", "")
	must(t, err)

	die(d)
	next := openTestDriver(t, d.home, Options{})
	must(t, next.Put("box"))
	must(t, next.Put("base"))
	wantErr(t, next.Put("box"), ErrNotMounted)
	path, err := next.Get("box2", "")
	must(t, err)
	must(t, next.Put("box2"))
	if mounted, err := mountinfo.Mounted(path); err != nil || !mounted {
		t.Errorf("the former process's use is not counted: %v %v", mounted, err)
	}
	must(t, next.Put("box2"))
	wantErr(t, next.Put("box2"), ErrNotMounted)
	must(t, next.Remove("box"))
}

// TestStaleMerged: after a reboot merged is there, and nothing mounted on it.
func TestStaleMerged(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	must(t, os.Mkdir(d.home+"/box/merged", 0o700))
	wantErr(t, d.Put("box"), ErrNotMounted)
	path, put := get(t, d, "box")
	if mounted, err := mountinfo.Mounted(path); err != nil || !mounted {
		t.Errorf("mounted: %v %v", mounted, err)
	}
	put()
}

// TestPutFails: a failed unmount is returned, and the use stays counted.
func TestPutFails(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	for i := range 4 { // kept from the third on
		path, err := d.Get("box", "")
		must(t, err)
		overlaytest.WithoutCap(t, unix.CAP_SYS_ADMIN, func() { err = d.Put("box") })
		wantErr(t, err, unix.EPERM)
		if !strings.Contains(err.Error(), path) {
			t.Errorf("no path in %q", err)
		}
		if mounted, err := mountinfo.Mounted(path); err != nil || !mounted {
			t.Errorf("%d: mounted: %v %v", i, mounted, err)
		}
		must(t, d.Put("box"))
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%d: merged: %v", i, err)
		}
	}
}

// TestPutMoved: a layer whose directory was moved away is unmounted where it is.
func TestPutMoved(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	path, err := d.Get("box", "")
	must(t, err)
	must(t, os.Rename(d.home+"/box", d.home+"/staging/aside"))
	must(t, d.Put("box"))
	must(t, os.Rename(d.home+"/staging/aside", d.home+"/box"))
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("merged: %v", err)
	}
}

// TestUnmountedBehind: Put of a layer that somebody else has unmounted succeeds.
func TestUnmountedBehind(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	path, err := d.Get("box", "")
	must(t, err)
	must(t, unix.Unmount(path, 0))
	must(t, d.Put("box"))
	wantErr(t, d.Put("box"), ErrNotMounted)
}

// TestManyAtOnce: Gets and Puts of the same layers from many goroutines.
func TestManyAtOnce(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	for i := range 4 {
		must(t, d.CreateReadWrite(sizeName(i), "base", nil))
	}
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 20 {
				id := sizeName((g + i) % 4)
				path, err := d.Get(id, "")
				if err == nil {
					err = os.WriteFile(fmt.Sprintf("%s/%d-%d", path, g, i), nil, 0o600)
				}
				if err = errors.Join(err, d.Put(id)); err != nil {
					t.Error(err)
				}
				own := fmt.Sprintf("own-%d-%d", g, i)
				if err := errors.Join(d.CreateReadWrite(own, "base", nil), d.Remove(own)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for i := range 4 {
		wantErr(t, d.Put(sizeName(i)), ErrNotMounted)
	}
	if len(d.layers.states) != 0 {
		t.Errorf("%d states stay", len(d.layers.states))
	}
}

// TestPropagation: below a shared mount the home becomes a private one, so that mounts of
// layers do not appear in other mount namespaces; Cleanup undoes it.
func TestPropagation(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "tmpfs", "cmd:unshare", "cmd:cat")
	dir := t.TempDir()
	must(t, unix.Mount("shared", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	must(t, unix.Mount("", dir, "", unix.MS_SHARED, ""))
	// Another namespace that takes part in the propagation.
	other := exec.Command("unshare", "--mount", "--propagation", "unchanged", "cat")
	hold, err := other.StdinPipe()
	must(t, err)
	must(t, other.Start())
	t.Cleanup(func() {
		must(t, hold.Close())
		must(t, other.Wait())
	})
	// A namespace made later would begin with a copy of the layer's mount.
	for own, theirs := "", ""; own == theirs; time.Sleep(time.Millisecond) {
		own, err = os.Readlink("/proc/self/ns/mnt")
		must(t, err)
		theirs, err = os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", other.Process.Pid))
		must(t, err)
	}
	d := newTestDriver(t, dir+"/home", Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	_, put := get(t, d, "box")
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", other.Process.Pid))
	must(t, err)
	if strings.Contains(string(mounts), d.home+"/box/merged") {
		t.Error("the layer's mount appears in another namespace")
	}
	must(t, d.Cleanup()) // busy: the home's mount stays
	put()
	must(t, d.Cleanup())
	if mounted, err := mountinfo.Mounted(d.home); err != nil || mounted {
		t.Errorf("the home is still mounted on itself: %v %v", mounted, err)
	}
}

func BenchmarkCreateRemove(b *testing.B) {
	overlaytest.Require(b, "root", "overlay")
	d, err := New(b.TempDir(), Options{})
	must(b, err)
	must(b, d.Create("base", "", nil))
	b.ReportAllocs()
	for b.Loop() {
		must(b, d.CreateReadWrite("box", "base", nil))
		must(b, d.Remove("box"))
	}
	must(b, d.Cleanup())
}
