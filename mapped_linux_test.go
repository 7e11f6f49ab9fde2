package overlay2

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/bcc2decd/overlay2/archive"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// mapAt is the id map of a container whose root is base outside of it.
func mapAt(base uint32) archive.IDMap {
	ids := []archive.IDRange{{ContainerID: 0, HostID: base, Size: 65536}}
	return archive.IDMap{UIDs: ids, GIDs: ids}
}

// inContainer runs a shell script as root of a user namespace with the map, in dir.
func inContainer(t *testing.T, m archive.IDMap, dir, script string) string {
	t.Helper()
	overlaytest.Require(t, "userns", "cmd:sh", "cmd:stat")
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	cmd := exec.Command("sh", "-ec", "cd /proc/self/fd/3\n"+script)
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: procMap(m.UIDs), GidMappings: procMap(m.GIDs),
		Credential: &syscall.Credential{NoSetGroups: true}, // root there
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in the container: %v\n%s", err, out)
	}
	return string(out)
}

// ownedEntries are files of several owners.
func ownedEntries(t *testing.T) []byte {
	entry := func(name string, uid, gid int, body string) tarEntry {
		e := file(name, body)
		e.Uid, e.Gid = uid, gid
		return e
	}
	return makeTar(t, entry("root", 0, 0, "r"), entry("user", 1000, 100, "u"), entry("copied", 7, 8, "old"), entry("gone", 3, 4, "g"),
		entry("dir/", 5, 6, ""), entry("dir/f", 65535, 65535, "f"))
}

// work is what a container does, and what it sees of owners.
const work = `stat -c '%n %u:%g' . root user dir dir/f
echo new >copied; rm gone; rm -r dir; mkdir dir
echo mine >mine; chown 12:34 mine; chmod 4755 mine; ln -s mine link
chown 20:21 user
stat -c '%n %u:%g' copied dir mine link user`

// seen is what work prints, whichever map the container has.
const seen = `. 0:0
root 0:0
user 1000:100
dir 5:6
dir/f 65535:65535
copied 7:8
dir 0:0
mine 12:34
link 0:0
user 20:21
`

// mappedDrivers runs f with each way of giving idmapped mounts to an overlay that this machine has.
func mappedDrivers(t *testing.T, f func(t *testing.T, d *Driver)) {
	overlaytest.Require(t, "root", "overlay", "idmap")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		for by, name := range map[mappedBy]string{mappedFD: "descriptors", mappedAttached: "attached"} {
			t.Run(name, func(t *testing.T) {
				d := newTestDriver(t, filepath.Join(dir, name), Options{})
				have, err := d.mapping()
				if errors.Is(err, ErrNotSupported) && d.facts.backingFS == "tmpfs" {
					t.Log(err) // 6.1 cannot on tmpfs, and says so
					return
				}
				must(t, err)
				if by == mappedFD && have == mappedAttached {
					t.Log("the kernel takes no descriptors of layers (6.13)")
					return
				}
				d.mapped = by
				f(t, d)
			})
		}
	})
}

// TestMappedProbe: each way is found by its own probe, also the one that a newer kernel never
// comes to: where a Driver can use it, it works.
func TestMappedProbe(t *testing.T) {
	mappedDrivers(t, func(t *testing.T, d *Driver) {
		if by, err := d.probeMapped(d.mapped); by != d.mapped || err != nil {
			t.Errorf("got %d, want %d: %v", by, d.mapped, err)
		}
	})
}

// TestMappedContainers: one copy of an image serves containers with different maps at once; each
// sees the image's owners, and what it writes has them on disk, so that its diff tells them, can be
// applied anywhere and be a parent.
func TestMappedContainers(t *testing.T) {
	mappedDrivers(t, func(t *testing.T, d *Driver) {
		apply(t, d, "base", "", ownedEntries(t))
		apply(t, d, "image", "base", makeTar(t, file("more", "m")))
		before := tree(t, d, "base")
		var diffs []string
		for i, base := range []uint32{100000, 300000} {
			id, m := fmt.Sprint("box", i), mapAt(base)
			must(t, d.CreateReadWrite(id, "image", nil))
			path, err := d.GetWith(id, MountOpts{IDMap: m})
			must(t, err)
			t.Cleanup(func() { must(t, d.Put(id)) })
			if got := inContainer(t, m, path, work); got != seen {
				t.Errorf("map %d: seen\n%s", base, got)
			}
			var st unix.Stat_t
			must(t, unix.Lstat(path+"/root", &st))
			if st.Uid != base {
				t.Errorf("on the host root is %d", st.Uid)
			}
			must(t, unix.Lstat(d.home+"/"+id+"/diff/mine", &st))
			if st.Uid != 12 || st.Gid != 34 || st.Mode&0o7777 != 0o4755 {
				t.Errorf("on disk mine is %d:%d %o", st.Uid, st.Gid, st.Mode)
			}
			diffs = append(diffs, string(readDiff(t, d, id, "image")))
		}
		overlaytest.Compare(t, before, tree(t, d, "base"))
		other := newTestDriver(t, d.home+"-other", Options{})
		apply(t, other, "base", "", ownedEntries(t))
		apply(t, other, "image", "base", makeTar(t, file("more", "m")))
		for i, diff := range diffs {
			id := fmt.Sprint("copy", i)
			apply(t, other, id, "image", []byte(diff))
			path, put := get(t, other, id)
			overlaytest.Compare(t, mappedTree, firstWords(overlaytest.Tree(t, path, overlaytest.NoRoot, overlaytest.NoTimes), 4))
			put()
		}
	})
}

// mappedTree is what work leaves.
const mappedTree = `"copied" file 0644 7:8
"dir" dir 0755 0:0
"link" symlink 0777 0:0
"mine" file 4755 12:34
"more" file 0644 0:0
"root" file 0644 0:0
"user" file 0644 20:21
`

// TestMappedUses: which uses of a layer go together.
func TestMappedUses(t *testing.T) {
	mappedDrivers(t, func(t *testing.T, d *Driver) {
		apply(t, d, "base", "", ownedEntries(t))
		apply(t, d, "image", "base", makeTar(t, file("more", "m")))
		must(t, d.CreateReadWrite("box", "image", nil))
		must(t, d.CreateReadWrite("plain", "", nil))
		a, b := MountOpts{IDMap: mapAt(100000)}, MountOpts{IDMap: mapAt(200000)}
		for _, id := range []string{"base", "image", "box", "plain"} {
			path, err := d.GetWith(id, a)
			must(t, err)
			again, err := d.GetWith(id, a)
			must(t, err)
			if again != path || path != d.home+"/"+id+"/merged" {
				t.Errorf("%s is at %s and %s", id, path, again)
			}
			next := openTestDriver(t, d.home, Options{}) // as another process
			for _, d := range []*Driver{d, next} {
				_, err = d.GetWith(id, b)
				wantErr(t, err, ErrLayerInUse)
				_, err = d.Get(id, "")
				wantErr(t, err, ErrLayerInUse)
			}
			if id == "box" { // a comparison of mounts would lie of owners
				_, err = d.Diff("box", "base")
				wantErr(t, err, ErrLayerInUse)
			}
			must(t, errors.Join(d.Put(id), d.Put(id)))
			wantErr(t, d.Put(id), ErrNotMounted)
			path, err = d.GetWith(id, b)
			must(t, err)
			var st unix.Stat_t
			must(t, unix.Lstat(path, &st))
			if st.Uid != 200000 {
				t.Errorf("%s: root is %d", id, st.Uid)
			}
			die(d)
			for range 2 { // adopted, and got
				_, err = next.GetWith(id, b)
				must(t, err)
			}
			must(t, errors.Join(next.Put(id), next.Put(id), next.Put(id)))
			d.layers.states = nil
			_, put := get(t, d, id)
			put()
		}
		must(t, d.Remove("box"))
	})
}

// TestMappedViews: views with maps of one layer, several at a time.
func TestMappedViews(t *testing.T) {
	mappedDrivers(t, func(t *testing.T, d *Driver) {
		apply(t, d, "base", "", ownedEntries(t))
		apply(t, d, "image", "base", makeTar(t, file("more", "m")))
		for _, id := range []string{"base", "image"} {
			for _, base := range []uint32{0, 100000, 200000} {
				opts := MountOpts{}
				if base > 0 {
					opts.IDMap = mapAt(base)
				}
				m, err := d.Mount(id, opts)
				must(t, err)
				t.Cleanup(func() { must(t, m.Close()) })
				var st unix.Stat_t
				must(t, unix.Fstatat(m.FD(), "user", &st, 0))
				if st.Uid != base+1000 || st.Gid != base+100 {
					t.Errorf("%s with map %d: %d:%d", id, base, st.Uid, st.Gid)
				}
				if err := unix.Mkdirat(m.FD(), "d", 0o700); !errors.Is(err, unix.EROFS) {
					t.Errorf("can be written: %v", err)
				}
			}
		}
		if inMountTable(t, d) {
			t.Error("a view is in the mount table")
		}
	})
}

// TestMappedDeep: as many layers as without a map.
func TestMappedDeep(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "idmap")
	d := newTestDriver(t, t.TempDir(), Options{})
	_, err := d.mapping()
	must(t, err)
	parent := deepChain(t, d, d.maxDepth)
	must(t, d.CreateReadWrite("box", parent, nil))
	for _, by := range []mappedBy{d.mapped, mappedAttached} {
		d.mapped = by
		path, err := d.GetWith("box", MountOpts{IDMap: mapAt(100000)})
		must(t, err)
		wantChain(t, path, d.maxDepth)
		must(t, d.Put("box"))
	}
}

// TestChownedLayers: the other way, as Docker: the Driver has the map, the layers are chowned when
// they are unpacked, and the diff translates back.
func TestChownedLayers(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		m := mapAt(100000)
		d := newTestDriver(t, dir, Options{IDMap: m})
		apply(t, d, "base", "", ownedEntries(t))
		must(t, d.CreateReadWrite("box", "base", nil))
		path, put := get(t, d, "box")
		if got := inContainer(t, m, path, work); got != seen {
			t.Errorf("seen\n%s", got)
		}
		put()
		var st unix.Stat_t
		must(t, unix.Lstat(d.home+"/box/diff/mine", &st))
		if st.Uid != 100012 || st.Gid != 100034 {
			t.Errorf("on disk mine is %d:%d", st.Uid, st.Gid)
		}
		plain := newTestDriver(t, dir+"-plain", Options{})
		apply(t, plain, "base", "", ownedEntries(t))
		apply(t, plain, "box", "base", readDiff(t, d, "box", "base"))
		must(t, unix.Lstat(plain.home+"/box/diff/mine", &st))
		if st.Uid != 12 || st.Gid != 34 {
			t.Errorf("in the diff mine is %d:%d", st.Uid, st.Gid)
		}
		_, err := d.GetWith("box", MountOpts{IDMap: m})
		wantErr(t, err, ErrInvalidOption)
	})
}

// TestMappedRefused: maps that say nothing, and a kernel that cannot.
func TestMappedRefused(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	must(t, d.Create("base", "", nil))
	must(t, d.CreateReadWrite("box", "base", nil))
	one := []archive.IDRange{{ContainerID: 1, HostID: 1, Size: 1}}
	for _, m := range []archive.IDMap{{UIDs: one}, {UIDs: one, GIDs: one}, {UIDs: mapAt(1).UIDs}, {UIDs: []archive.IDRange{{}}, GIDs: one}} {
		_, err := d.GetWith("box", MountOpts{IDMap: m})
		wantErr(t, err, ErrInvalidOption)
		_, err = d.Mount("box", MountOpts{IDMap: m})
		wantErr(t, err, ErrInvalidOption)
	}
	d.mappedOnce.Do(func() { d.mappedErr = unsupported("no: %w", unix.EPERM) })
	for _, id := range []string{"base", "box"} {
		_, err := d.GetWith(id, MountOpts{IDMap: mapAt(1)})
		wantErr(t, err, ErrNotSupported)
		wantErr(t, err, unix.EPERM)
		_, err = d.Mount(id, MountOpts{IDMap: mapAt(1)})
		wantErr(t, err, ErrNotSupported)
		_, put := get(t, d, id)
		put()
	}
	if got := statusOf(d, "ID-mapped Mounts"); !strings.HasPrefix(got, "false: ") {
		t.Errorf("Status says %q", got)
	}
}

// TestNewUserNS: the namespace has the map, and no process stays.
func TestNewUserNS(t *testing.T) {
	overlaytest.Require(t, "root", "userns")
	fd, err := sys.NewUserNS(procMap(mapAt(100000).UIDs), procMap(mapAt(100000).GIDs))
	must(t, err)
	defer func() { must(t, sys.Close(fd)) }()
	own, err := os.Readlink("/proc/self/ns/user")
	must(t, err)
	got, err := os.Readlink(sys.ProcPath(fd))
	must(t, err)
	if got == own || !strings.HasPrefix(got, "user:[") {
		t.Errorf("got %s, own %s", got, own)
	}
	var status unix.WaitStatus
	if pid, err := unix.Wait4(-1, &status, unix.WNOHANG|unix.WALL, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a child stays: %d %v", pid, err)
	}
	_, err = sys.NewUserNS([]syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 0}}, nil)
	if err == nil {
		t.Error("a map that the kernel refuses")
	}
}
