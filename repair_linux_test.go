package overlay2

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// The layers of a home to be damaged, each after its parent. box and lone are read-write layers.
var damagedLayers = []string{"base", "mid", "top", "side", "box", "base2", "lone"}

var damagedParents = map[string]string{"mid": "base", "top": "mid", "side": "base", "box": "top", "lone": "base2"}

// children says which layers have others above them.
func hasChild(id string) bool {
	for _, parent := range damagedParents {
		if parent == id {
			return true
		}
	}
	return false
}

// makeDamaged makes the home.
func makeDamaged(t *testing.T, home string) {
	t.Helper()
	d, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	for _, id := range damagedLayers {
		parent := damagedParents[id]
		if id == "box" || id == "lone" {
			must(t, d.CreateReadWrite(id, parent, nil))
			fill(t, d, id, "file own/"+id+" \""+id+"\"\nfile all-"+id+" \""+id+"\"")
			continue
		}
		apply(t, d, id, parent, makeTar(t, file("own/", ""), file("own/"+id, id), file("all", id)))
	}
	must(t, d.Cleanup())
}

// damagedTree returns the merged tree of a layer, or why it cannot be had.
func damagedTree(t *testing.T, d *Driver, id string) (string, error) {
	t.Helper()
	path, err := d.Get(id, "")
	if err != nil {
		return "", err
	}
	got := overlaytest.Tree(t, path, overlaytest.NoOverlayXattrs, overlaytest.NoTimes)
	must(t, d.Put(id))
	return got, nil
}

// damage is something that happens to one file. It reports whether it could.
type damage struct {
	name string
	do   func(t *testing.T, path string) bool
}

func damages() []damage {
	put := func(f func(path string) error) func(t *testing.T, path string) bool {
		return func(t *testing.T, path string) bool {
			must(t, os.RemoveAll(path))
			must(t, f(path))
			return true
		}
	}
	content := func(text string) func(string) error {
		return func(path string) error { return os.WriteFile(path, []byte(text), 0o644) }
	}
	return []damage{
		{"delete", put(func(string) error { return nil })},
		{"empty", put(content(""))},
		{"half", func(t *testing.T, path string) bool {
			st, err := os.Lstat(path)
			if err != nil || !st.Mode().IsRegular() || st.Size() == 0 {
				return false
			}
			must(t, os.Truncate(path, st.Size()/2))
			return true
		}},
		{"garbage", put(content("\x00garbage\xff: l/ ../../etc\n"))},
		{"zeros", put(content(string(make([]byte, 57))))},
		{"long", put(content(strings.Repeat("l/"+linkA+":", 1000)))},
		{"valid", put(content(linkA))},
		{"dir", put(directory)},
		{"fifo", put(fifo)},
		{"symlink", put(symlink("/etc/passwd"))},
		{"symlink to l", put(symlink("../l"))},
		{"device", put(func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) })},
		{"full dir", put(func(path string) error {
			return errors.Join(directory(path), content("wanted")(path+"/file"))
		})},
	}
}

// damageCase is a damage to a home and what must be known of it.
type damageCase struct {
	name string
	do   func(t *testing.T, home string) bool
	// unseen are layers that may have a wrong tree: their lower file was exchanged for another whole one,
	// and nothing else on disk says what theirs was.
	unseen []string
	// lost says that what was there cannot be known, so that it stays reported; lostOK that it may be mended or not.
	lost bool
	// harmless says that Check need not see it.
	harmless bool
	// gone is the layer whose content is lost.
	gone string
}

// damageCases are every metadata file of the home with every damage, and every two of a kind exchanged.
func damageCases(t *testing.T, home string) []damageCase {
	links := map[string]string{}
	for _, id := range damagedLayers {
		data, err := os.ReadFile(home + "/" + id + "/link")
		must(t, err)
		links[id] = string(data)
	}
	var cases []damageCase
	for _, id := range damagedLayers {
		for _, name := range []string{linkName, lowerName, committedName, workName, mergedName, "l"} {
			path := id + "/" + name
			if name == "l" {
				path = "l/" + links[id]
			}
			for _, dmg := range damages() {
				c := damageCase{name: strings.Replace(path, links[id], strings.ToUpper(id), 1) + " " + dmg.name, do: func(t *testing.T, home string) bool {
					// A base layer's lower that is deleted, or a layer's merged, is none.
					if _, err := os.Lstat(home + "/" + path); err != nil && dmg.name == "delete" {
						return false
					}
					return dmg.do(t, home+"/"+path)
				}}
				switch {
				case name == workName && damagedParents[id] == "":
					c.lost = true // a base layer has none: it looks as if its lower had been lost
				case dmg.name == "full dir":
					c.lost = name != workName // whatever is in it may be wanted
					c.harmless = name == workName
				case name == lowerName && damagedParents[id] != "" && !hasChild(id):
					c.lost = dmg.name != "half"
				case name == lowerName && damagedParents[id] == "" && !hasChild(id):
					c.lost = true
				case name == committedName:
					c.harmless = dmg.name == "empty" || dmg.name == "delete" && !hasChild(id)
				case name == workName && dmg.name == "dir" && damagedParents[id] != "":
					c.harmless = true
				}
				cases = append(cases, c)
			}
		}
	}
	for _, id := range damagedLayers {
		for _, dmg := range damages() {
			if dmg.name != "half" && dmg.name != "dir" && dmg.name != "full dir" { // other content is for Verify to find
				path := id + "/" + diffName
				cases = append(cases, damageCase{name: path + " " + dmg.name, lost: true, gone: id,
					do: func(t *testing.T, home string) bool { return dmg.do(t, home+"/"+path) }})
			}
		}
	}
	for i, a := range damagedLayers {
		for _, b := range damagedLayers[:i] {
			for _, name := range []string{linkName, lowerName, "l"} {
				pa, pb := a+"/"+name, b+"/"+name
				if name == "l" {
					pa, pb = "l/"+links[a], "l/"+links[b]
				}
				c := damageCase{name: "swap " + name + " of " + a + " and " + b, do: func(t *testing.T, home string) bool {
					return unix.Renameat2(unix.AT_FDCWD, home+"/"+pa, unix.AT_FDCWD, home+"/"+pb, unix.RENAME_EXCHANGE) == nil
				}}
				if name == lowerName {
					c.unseen = []string{a, b}
					c.lost = true
					c.harmless = damagedParents[a] == damagedParents[b] || !hasChild(a) && !hasChild(b)
				} else if damagedParents[a] == "" && damagedParents[b] == "" {
					c.lost = true // two trees that differ in nothing but this
				}
				cases = append(cases, c)
			}
		}
	}
	return cases
}

// TestDamage: whatever happens to one metadata file, no call panics or hangs, no wrong tree is mounted and no wrong
// diff read, Check reports it, and Repair mends all that can be known, without a change of what layers hold.
func TestDamage(t *testing.T) {
	overlaytest.Require(t, "root", "overlay", "mknod")
	overlaytest.NoLeaks(t)
	dir := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
	home := dir + "/home"
	makeDamaged(t, home)
	trees, diffs, contents := map[string]string{}, map[string][]byte{}, map[string]string{}
	d, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	for _, id := range damagedLayers {
		trees[id], err = damagedTree(t, d, id)
		must(t, err)
		diffs[id] = readDiff(t, d, id, damagedParents[id])
		contents[id] = overlaytest.Tree(t, filepath.Join(home, id, diffName), overlaytest.NoOverlayXattrs)
	}
	must(t, d.Cleanup())
	must(t, os.Remove(home+"/staging"))
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen, mended, n := 0, 0, 0
	slots := make(chan struct{}, 8) // Check and Repair mostly wait, for what others may be about to end
	for i, c := range damageCases(t, home) {
		if testing.Short() && i%8 != 0 { // half a minute here is a quarter of an hour in a guest
			continue
		}
		copied := fmt.Sprintf("%s/%d", dir, i)
		overlaytest.CopyTree(t, home, copied)
		if !c.do(t, copied) {
			must(t, os.RemoveAll(copied))
			continue
		}
		n++
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			s := &damageTest{home: copied, trees: trees, diffs: diffs, contents: contents}
			t.Run(c.name, func(t *testing.T) { s.run(t, c) })
			if err := os.RemoveAll(copied); err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			seen, mended = seen+s.seen, mended+s.mended
		})
	}
	wg.Wait()
	t.Logf("%d damages, %d seen, %d mended", n, seen, mended)
	if n < 400 && !testing.Short() {
		t.Errorf("only %d damages", n)
	}
}

type damageTest struct {
	home         string
	trees        map[string]string
	diffs        map[string][]byte
	contents     map[string]string
	seen, mended int
}

func (s *damageTest) run(t *testing.T, c damageCase) {
	foreign, err := CheckHome(s.home)
	must(t, err)
	d, err := New(s.home, quietOptions(DurabilityOff))
	must(t, err)
	defer func() { must(t, d.Cleanup()) }()
	problems, err := d.Check()
	must(t, err)
	if fmt.Sprint(foreign) != fmt.Sprint(problems) {
		t.Errorf("CheckHome: %v, Check: %v", foreign, problems)
	}
	s.compare(t, d, c, false)
	if len(problems) > 0 {
		s.seen++
	} else if !c.harmless {
		t.Error("not reported")
	}
	before := overlaytest.Tree(t, s.home, overlaytest.NoTimes)
	dry, err := d.Repair(RepairOpts{DryRun: true})
	must(t, err)
	if planned, err := PlanRepair(s.home, RepairOpts{}); err != nil || fmt.Sprint(planned) != fmt.Sprint(dry) {
		t.Errorf("planned: %v %v\ndry run: %v", planned, err, dry)
	}
	if after := overlaytest.Tree(t, s.home, overlaytest.NoTimes); after != before {
		t.Errorf("a dry run changed\n%s", overlaytest.Diff(before, after))
	}
	done, err := d.Repair(RepairOpts{})
	if err != nil && !c.lost {
		t.Errorf("repair: %v", err)
	}
	for i := range done {
		done[i].Err = nil
	}
	if fmt.Sprint(dry) != fmt.Sprint(done) {
		t.Errorf("dry run: %v\nthen done: %v", dry, done)
	}
	again, _ := d.Repair(RepairOpts{})
	if len(again) > 0 && !c.lost {
		t.Errorf("again: %v", again)
	}
	left, err := d.Check()
	must(t, err)
	switch {
	case len(left) == 0:
		s.mended++
	case !c.lost:
		t.Errorf("left: %v\ndone: %v", left, done)
	}
	s.compare(t, d, c, len(left) == 0)
	for _, id := range damagedLayers {
		if id == c.gone {
			continue
		}
		got := overlaytest.Tree(t, filepath.Join(s.home, id, diffName), overlaytest.NoOverlayXattrs)
		overlaytest.Compare(t, s.contents[id], got)
	}
}

// compare looks at each layer: it is as it was or, unless whole, an error.
func (s *damageTest) compare(t *testing.T, d *Driver, c damageCase, whole bool) {
	t.Helper()
	for _, id := range damagedLayers {
		if slices.Contains(c.unseen, id) {
			continue
		}
		switch got, err := damagedTree(t, d, id); {
		case err == nil && got != s.trees[id]:
			t.Errorf("%s has a wrong tree:\n%s", id, overlaytest.Diff(s.trees[id], got))
		case err != nil && whole:
			t.Errorf("no problems, but: %v", err)
		case err != nil && !errors.Is(err, ErrCorrupt):
			t.Errorf("%s: %v, which is not ErrCorrupt", id, err)
		}
		r, err := d.Diff(id, damagedParents[id])
		if err == nil {
			var b bytes.Buffer
			_, err = b.ReadFrom(r)
			must(t, r.Close())
			if err == nil && !bytes.Equal(b.Bytes(), s.diffs[id]) {
				t.Errorf("%s has a wrong diff", id)
			}
		}
		if err != nil && whole {
			t.Errorf("no problems, but: %v", err)
		}
	}
}
