package overlay2

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// TestKnownDamage: a Driver that has made and mounted layers, and remembers them, says of a home that was damaged since the
// same as one that knows nothing.
func TestKnownDamage(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	link := func(t *testing.T, home, id string) string {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(home, id, linkName))
		must(t, err)
		return filepath.Join(home, linkDir, string(data))
	}
	relink := func(id, to string) func(t *testing.T, home string) {
		return func(t *testing.T, home string) {
			must(t, os.Remove(link(t, home, id)))
			must(t, os.Symlink(linkTarget(to), link(t, home, id)))
		}
	}
	file := func(name, content string) func(t *testing.T, home string) {
		return func(t *testing.T, home string) {
			must(t, os.WriteFile(filepath.Join(home, name), []byte(content), 0o600))
		}
	}
	remove := func(name string) func(t *testing.T, home string) {
		return func(t *testing.T, home string) { must(t, os.RemoveAll(filepath.Join(home, name))) }
	}
	for name, damage := range map[string]func(t *testing.T, home string){
		"none":                      func(*testing.T, string) {},
		"parent's link elsewhere":   relink("layer2", "layer1"),
		"parent's link gone":        func(t *testing.T, home string) { must(t, os.Remove(link(t, home, "layer2"))) },
		"parent's link file":        file("layer2/"+linkName, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
		"parent's link file empty":  file("layer2/"+linkName, ""),
		"parent gone":               remove("layer2"),
		"parent's diff gone":        remove("layer2/diff"),
		"parent's lower gone":       remove("layer2/lower"),
		"parent's lower ends early": func(t *testing.T, home string) { must(t, os.Truncate(home+"/layer2/lower", 28)) },
		"parent incomplete":         file("layer2/"+incompleteName, ""),
		"base no base":              file("layer0/"+lowerName, "l/ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
		"parent another": func(t *testing.T, home string) {
			must(t, os.Rename(home+"/layer2", home+"/was"))
			must(t, os.Rename(home+"/layer1", home+"/layer2"))
		},
		"grandparent gone":   remove("layer1"),
		"grandparent's link": relink("layer1", "layer0"),
		"own link elsewhere": relink("box", "layer1"),
		"own link to a box":  relink("box", "mounted"),
		"own link gone":      func(t *testing.T, home string) { must(t, os.Remove(link(t, home, "box"))) },
		"own diff gone":      remove("box/diff"),
		"own diff a file":    func(t *testing.T, home string) { remove("box/diff")(t, home); file("box/diff", "")(t, home) },
		"own lower a directory": func(t *testing.T, home string) {
			remove("box/lower")(t, home)
			must(t, os.Mkdir(home+"/box/lower", 0o700))
		},
		"own lower too long":        func(t *testing.T, home string) { must(t, os.Truncate(home+"/box/lower", int64(maxLowerFile+1))) },
		"own lower of another size": func(t *testing.T, home string) { must(t, os.Truncate(home+"/box/lower", int64(shortLowerFile))) },
		"own lower another": func(t *testing.T, home string) {
			must(t, os.WriteFile(home+"/box/lower", []byte(linkPrefix+filepath.Base(link(t, home, "layer0"))), 0))
		},
		"own lower gone":     remove("box/lower"),
		"own link file":      file("box/"+linkName, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
		"own link file gone": remove("box/" + linkName),
		"own work gone":      remove("box/work"),
		"own work a file":    func(t *testing.T, home string) { remove("box/work")(t, home); file("box/work", "")(t, home) },
		"own merged a file":  file("box/merged", ""),
		"incomplete":         file("box/"+incompleteName, ""),
		"committed":          file("box/"+committedName, ""),
		"gone":               remove("box"),
		"moved":              func(t *testing.T, home string) { must(t, os.Rename(home+"/box", home+"/was")) },
		"own diff another": func(t *testing.T, home string) {
			remove("box/diff")(t, home)
			must(t, os.Mkdir(home+"/box/diff", 0o755))
		},
		"work of another kind": func(t *testing.T, home string) { must(t, os.Chmod(home+"/box/work", 0)) },
		"another": func(t *testing.T, home string) {
			must(t, os.Rename(home+"/box", home+"/was"))
			must(t, os.Rename(home+"/mounted", home+"/box"))
		},
	} {
		for _, kept := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, kept=%v", name, kept), func(t *testing.T) { testKnownDamage(t, damage, kept) })
		}
	}
}

func getPut(t *testing.T, d *Driver, id string, times int) {
	t.Helper()
	for range times {
		_, err := d.Get(id, "")
		must(t, err)
		must(t, d.Put(id))
	}
}

func testKnownDamage(t *testing.T, damage func(t *testing.T, home string), kept bool) {
	overlaytest.NoLeaks(t)
	home := t.TempDir()
	d, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	deepChain(t, d, 3)
	for i := range 3 {
		must(t, os.WriteFile(fmt.Sprintf("%s/layer%d/diff/%d", home, i, i), nil, 0o644))
	}
	must(t, d.CreateReadWrite("mounted", "layer2", nil))
	getPut(t, d, "mounted", 2)
	must(t, d.CreateReadWrite("box", "layer2", nil))
	if kept {
		getKept(t, d, "box")
	}
	if lower, err := os.ReadFile(home + "/box/" + lowerName); err != nil || !d.known.mayBeReady(string(lower)) {
		t.Errorf("nothing is remembered: %v", err)
	}
	damage(t, home)
	fresh, err := New(home, quietOptions(DurabilityOff))
	must(t, err)
	try := func(d *Driver, id string) (results [4]string) {
		for i, f := range []func() error{
			func() error { return d.Create(id, "layer2", nil) },
			func() error { return d.CreateReadWrite(id+"-rw", "layer2", nil) },
			func() error {
				path, err := d.Get("box", "")
				if err != nil {
					return err
				}
				names, err := os.ReadDir(path)
				must(t, err)
				var st unix.Statfs_t
				must(t, unix.Statfs(path, &st))
				results[3] = fmt.Sprint(names, st.Flags&unix.ST_RDONLY)
				return d.Put("box")
			},
		} {
			if err := f(); err != nil {
				results[i] = err.Error()
			}
		}
		must(t, d.Remove(id))
		must(t, d.Remove(id+"-rw"))
		return results
	}
	if got, want := try(d, "new"), try(fresh, "new"); got != want {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
	must(t, d.Cleanup())
	must(t, fresh.Cleanup())
}
