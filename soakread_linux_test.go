package overlay2

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// What TestSoak reads of layers, whose locks are held for reading, and the trees that they hold: by path, with the
// content of a file, "/" for a directory, and "@" with its target for a symlink.

// check looks at the home while others work.
func (w *soakWorker) check() error {
	w.note("check")
	problems, err := w.s.d.Check()
	for _, p := range problems {
		if !errors.Is(p.Err, ErrIncomplete) { // one that is being filled
			err = errors.Join(err, errors.New(p.String()))
		}
	}
	return err
}

// another opens the home a second time, as another process would.
func (w *soakWorker) another() error {
	l := w.pick()
	if l == nil {
		return nil
	}
	defer l.mu.RUnlock()
	w.note("get %s by another driver", l.id)
	d, err := New(w.s.d.home, quietOptions(DurabilityStrict))
	if err != nil {
		return err
	}
	path, err := d.Get(l.id, "")
	if err == nil {
		err = errors.Join(sameSoakTree(path, l.tree), wantSoakErr(w.s.d.Remove(l.id), ErrLayerInUse), d.Put(l.id))
	}
	return errors.Join(err, d.Cleanup())
}

// get gets a layer once or several times, as others do at the same time.
func (w *soakWorker) get(l *soakLayer) (err error) {
	w.note("get %s", l.id)
	got, path := 0, ""
	for times := 1 + w.r.IntN(3); got < times; got++ {
		if path, err = w.s.d.Get(l.id, ""); err != nil {
			break
		}
	}
	if err == nil {
		err = errors.Join(sameSoakTree(path, l.tree), wantSoakErr(w.s.d.Remove(l.id), ErrLayerInUse))
	}
	for range got {
		err = errors.Join(err, w.s.d.Put(l.id))
	}
	return err
}

// view compares a view. There is none of a layer that somebody has got and can write.
func (w *soakWorker) view(l *soakLayer) error {
	w.note("mount %s", l.id)
	m, err := w.s.d.Mount(l.id, MountOpts{})
	if errors.Is(err, ErrLayerInUse) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(sameSoakTree(m.Path(), l.tree), wantSoakErr(w.s.d.Remove(l.id), ErrLayerInUse), m.Close())
}

// diff reads a diff, to its end or not, and compares what is told of its size.
func (w *soakWorker) diff(l *soakLayer) error {
	w.note("diff %s", l.id)
	r, err := w.s.d.Diff(l.id, l.parentID())
	if err != nil {
		return err
	}
	if w.r.IntN(4) == 0 {
		_, err := io.CopyN(io.Discard, r, int64(w.r.IntN(5000)))
		if err == io.EOF {
			err = nil
		}
		return errors.Join(err, r.Close())
	}
	files, size, err := readSoakTar(r)
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	for name, content := range files {
		if l.tree[name] != content {
			return fmt.Errorf("the diff has %q in %s, not %q", short(content), name, short(l.tree[name]))
		}
	}
	told, err := w.s.d.DiffSize(l.id, l.parentID())
	if err == nil && told != size {
		err = fmt.Errorf("the diff has %d bytes, DiffSize says %d", size, told)
	}
	return err
}

// readSoakTar returns the files of a tar and how many bytes they and its symlinks have.
func readSoakTar(r io.Reader) (files map[string]string, size int64, err error) {
	files = map[string]string{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			_, err = io.Copy(io.Discard, r)
			return files, size, err
		}
		if err != nil {
			return nil, 0, err
		}
		base := filepath.Base(h.Name)
		switch {
		case strings.HasPrefix(base, ".wh."):
		case h.Typeflag == tar.TypeReg:
			data, err := io.ReadAll(tr)
			if err != nil {
				return nil, 0, err
			}
			files[strings.TrimPrefix(h.Name, "./")] = string(data)
			size += h.Size
		case h.Typeflag == tar.TypeSymlink:
			size += int64(len(h.Linkname))
		}
	}
}

// files opens files of a layer by their names.
func (w *soakWorker) files(l *soakLayer) error {
	w.note("files %s", l.id)
	r, err := w.s.d.Diff(l.id, l.parentID())
	if err != nil {
		return err
	}
	want, _, err := readSoakTar(r)
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	f, err := w.s.d.Files(l.id)
	if err != nil {
		return err
	}
	for name, content := range want {
		r, err := f.Open(name)
		if err != nil {
			return errors.Join(err, f.Close())
		}
		data, err := io.ReadAll(r)
		if err == nil && string(data) != content {
			err = fmt.Errorf("%s opened by name holds %q, not %q", name, short(string(data)), short(content))
		}
		if err := errors.Join(err, r.Close()); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(wantSoakErr(w.s.d.Remove(l.id), ErrLayerInUse), f.Close())
}

// facts compares what is told of a layer with the model.
func (w *soakWorker) facts(l *soakLayer) error {
	w.note("facts of %s", l.id)
	meta, err := w.s.d.GetMetadata(l.id)
	if err != nil {
		return err
	}
	var lowers []string
	for p := l.parent; p != nil; p = p.parent {
		lowers = append(lowers, filepath.Join(w.s.d.home, p.id, diffName))
	}
	if want := strings.Join(lowers, ":"); meta["LowerDir"] != want {
		return fmt.Errorf("LowerDir is %s, want %s", meta["LowerDir"], want)
	}
	if _, err := w.s.d.Usage(l.id); err != nil {
		return err
	}
	below := map[string]string{}
	if l.parent != nil {
		below = l.parent.tree // it has children: nobody changes it
	}
	changes, err := w.s.d.Changes(l.id, l.parentID())
	if err != nil {
		return err
	}
	changed := map[string]bool{}
	for _, c := range changes {
		changed[strings.TrimPrefix(c.Path, "/")] = true
	}
	for name, content := range l.tree {
		if below[name] != content && !changed[name] {
			return fmt.Errorf("%s differs from the parent's, and Changes does not say so", name)
		}
	}
	return nil
}

// soakDirs and soakFiles are the names that trees are made of.
var (
	soakDirs  = []string{"d0", "d1", "d1/d", "d2"}
	soakFiles = []string{"f0", "f1", "f2", "f3"}
)

func soakPath(r *rand.Rand) (dir, path string) {
	dir = soakDirs[r.IntN(len(soakDirs))]
	return dir, dir + "/" + soakFiles[r.IntN(len(soakFiles))]
}

// soakContent returns content, mostly small.
func soakContent(r *rand.Rand) string {
	n := r.IntN(200)
	if r.IntN(10) == 0 {
		n = r.IntN(20_000)
	}
	return strings.Repeat(fmt.Sprintf("%x ", r.Uint32()), n/9)
}

// addSoakDir adds a directory with those above it.
func addSoakDir(tree map[string]string, dir string) (missing []string) {
	for _, d := range []string{filepath.Dir(dir), dir} {
		if d != "." && tree[d] != "/" {
			tree[d] = "/"
			missing = append(missing, d)
		}
	}
	return missing
}

// removeSoakPath removes a name with all below it.
func removeSoakPath(tree map[string]string, path string) {
	maps.DeleteFunc(tree, func(name, _ string) bool { return name == path || strings.HasPrefix(name, path+"/") })
}

// soakTar makes up changes of a tree, and returns them as a tar and the tree that they lead to. Again says that the
// layer has content of its own, whose directories no mark hides.
func soakTar(t testing.TB, r *rand.Rand, tree map[string]string, again bool) ([]byte, map[string]string) {
	result := maps.Clone(tree)
	var entries []tarEntry
	used := map[string]bool{} // names that the tar has, and the directories above them
	use := func(path string) {
		for ; path != "."; path = filepath.Dir(path) {
			used[path] = true
		}
	}
	for range 1 + r.IntN(6) {
		dir, path := soakPath(r)
		switch kind := r.IntN(8); {
		case kind == 0 && !used[path] && result[path] != "":
			use(path)
			removeSoakPath(result, path)
			entries = append(entries, file(filepath.Dir(path)+"/.wh."+filepath.Base(path), ""))
		case kind == 1 && !again && !used[dir] && tree[dir] == "/" && result[dir] == "/":
			use(dir)
			removeSoakPath(result, dir)
			entries = append(entries, file(filepath.Join(filepath.Dir(dir), ".wh."+filepath.Base(dir)), ""))
			for _, d := range soakDirs { // nothing comes back below it
				used[d] = used[d] || strings.HasPrefix(d, dir+"/")
			}
		case kind == 2 && !again && !used[dir] && result[dir] == "/":
			use(dir)
			removeSoakPath(result, dir)
			result[dir] = "/"
			entries = append(entries, file(dir+"/", ""), file(dir+"/.wh..wh..opq", ""))
		case kind == 3 && !used["s"]:
			use("s")
			target := fmt.Sprint("to", r.IntN(1000))
			result["s"] = "@" + target
			entries = append(entries, tarEntry{tar.Header{Name: "s", Linkname: target, Typeflag: tar.TypeSymlink}, ""})
		case kind > 3 && !used[path] && (result[dir] == "/" || !used[dir]):
			use(path)
			for _, d := range addSoakDir(result, dir) {
				entries = append(entries, file(d+"/", ""))
			}
			result[path] = "-" + soakContent(r)
			entries = append(entries, file(path, result[path]))
		}
	}
	return makeTar(t, entries...), result
}

// soakWrite changes a mounted tree, and returns what it must be then.
func soakWrite(r *rand.Rand, root string, tree map[string]string) (result map[string]string, did string, err error) {
	result = maps.Clone(tree)
	for range 1 + r.IntN(6) {
		dir, path := soakPath(r)
		kind := r.IntN(7)
		did += fmt.Sprintf("%d:%s ", kind, path)
		switch {
		case kind == 0 && result[path] != "":
			removeSoakPath(result, path)
			err = os.Remove(filepath.Join(root, path))
		case kind == 1:
			removeSoakPath(result, dir)
			err = os.RemoveAll(filepath.Join(root, dir))
		case kind == 2 && result[path] != "":
			to, toPath := soakPath(r)
			if result[to] == "/" && toPath != path {
				did += "to " + toPath + " "
				result[toPath] = result[path]
				delete(result, path)
				err = os.Rename(filepath.Join(root, path), filepath.Join(root, toPath))
			}
		case kind == 3:
			target := fmt.Sprint("to", r.IntN(1000))
			result["s"] = "@" + target
			err = errors.Join(os.RemoveAll(filepath.Join(root, "s")), os.Symlink(target, filepath.Join(root, "s")))
		case kind > 3:
			addSoakDir(result, dir)
			result[path] = "-" + soakContent(r)
			if err = os.MkdirAll(filepath.Join(root, dir), 0o755); err == nil {
				err = os.WriteFile(filepath.Join(root, path), []byte(result[path]), 0o600)
			}
		}
		if err != nil {
			return nil, did, err
		}
	}
	return result, did, nil
}

// tarText lists the names of a tar.
func tarText(data []byte) string {
	var names []string
	for tr := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := tr.Next()
		if err != nil { // its end
			return fmt.Sprint(names)
		}
		names = append(names, h.Name)
	}
}

// readSoakTree reads a tree.
func readSoakTree(root string) (map[string]string, error) {
	tree := map[string]string{}
	err := filepath.WalkDir(root+"/.", func(path string, e fs.DirEntry, err error) error {
		name, _ := filepath.Rel(root, path)
		switch {
		case err != nil || name == ".":
		case e.IsDir():
			tree[name] = "/"
		case e.Type() == fs.ModeSymlink:
			var target string
			target, err = os.Readlink(path)
			tree[name] = "@" + target
		default:
			var data []byte
			data, err = os.ReadFile(path)
			tree[name] = string(data)
		}
		return err
	})
	return tree, err
}

// sameSoakTree returns the first difference between a tree and what it must be.
func sameSoakTree(root string, want map[string]string) error {
	got, err := readSoakTree(root)
	if err != nil {
		return err
	}
	names := slices.Sorted(maps.Keys(want))
	for name := range got {
		if _, ok := want[name]; !ok {
			names = append(names, name)
		}
	}
	for _, name := range names {
		if got[name] != want[name] {
			return fmt.Errorf("%s is %q, must be %q", name, short(got[name]), short(want[name]))
		}
	}
	return nil
}

// short returns the beginning of a long text.
func short(s string) string {
	if len(s) > 40 {
		return fmt.Sprintf("%s... of %d bytes", s[:40], len(s))
	}
	return s
}
