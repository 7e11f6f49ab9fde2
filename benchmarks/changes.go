//go:build linux

package main

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/bcc2decd/overlay2/benchmarks/wire"
	"golang.org/x/sys/unix"
)

// plan is a thousand changes to a tree: what a container might have done to its image.
type plan struct {
	modified, deleted, added []string
}

// makePlan spreads the changes over the regular files of a tree. Files with several
// names and large ones are left alone.
func makePlan(tree string) (*plan, error) {
	var names []string
	err := filepath.WalkDir(tree, func(p string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: p, Err: err}
		}
		if st.Nlink == 1 && st.Size < 64<<10 {
			names = append(names, p[len(tree)+1:])
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	const modified, deleted, added = 400, 300, 300
	step := len(names) / (modified + deleted)
	if step == 0 {
		return nil, fmt.Errorf("%s has only %d files to change", tree, len(names))
	}
	pl := &plan{}
	for i := range modified + deleted {
		name := names[i*step]
		switch {
		case i%7 < 4:
			pl.modified = append(pl.modified, name)
		default:
			pl.deleted = append(pl.deleted, name)
		}
		if len(pl.added) < added && i%2 == 0 {
			pl.added = append(pl.added, path.Join(path.Dir(name), fmt.Sprintf("added-%d", i)))
		}
	}
	return pl, nil
}

// carryOut makes the changes in a mounted tree.
func (p *plan) carryOut(root string) error {
	for _, name := range p.modified {
		f, err := os.OpenFile(filepath.Join(root, name), os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString("changed\n")
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	for _, name := range p.deleted {
		if err := os.Remove(filepath.Join(root, name)); err != nil {
			return err
		}
	}
	for _, name := range p.added {
		if err := os.WriteFile(filepath.Join(root, name), []byte(name), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// checkList compares a list of changes with the plan. Beside the plan's names there may
// be directories, changed because something in them was.
func (p *plan) checkList(lines []string) string {
	want := map[string]bool{}
	for _, n := range p.modified {
		want["C /"+n] = true
	}
	for _, n := range p.deleted {
		want["D /"+n] = true
	}
	for _, n := range p.added {
		want["A /"+n] = true
	}
	dirs := map[string]bool{}
	for line := range want {
		for d := path.Dir(line[2:]); d != "/"; d = path.Dir(d) {
			dirs["C "+d] = true
		}
	}
	for _, line := range lines {
		switch {
		case want[line]:
			delete(want, line)
		case !dirs[line]:
			return fmt.Sprintf("%q is no change", line)
		}
	}
	for line := range want {
		return fmt.Sprintf("%d changes are missing, such as %q", len(want), line)
	}
	return ""
}

// checkTar compares the tar of the changes with the plan and the content of base.
func (p *plan) checkTar(file, base string) (string, error) {
	want := map[string]string{} // a name in the tar: sha256 of its content, "" for a whiteout
	for _, n := range p.modified {
		data, err := os.ReadFile(filepath.Join(base, n))
		if err != nil {
			return "", err
		}
		want[n] = fmt.Sprintf("%x", sha256.Sum256(append(data, "changed\n"...)))
	}
	for _, n := range p.deleted {
		want[path.Join(path.Dir(n), ".wh."+path.Base(n))] = ""
	}
	for _, n := range p.added {
		want[n] = fmt.Sprintf("%x", sha256.Sum256([]byte(n)))
	}
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err.Error(), nil
		}
		name := path.Clean(strings.TrimPrefix(h.Name, "/"))
		sum, ok := want[name]
		if !ok && h.Typeflag == tar.TypeDir {
			continue
		}
		digest := sha256.New()
		if _, err := io.Copy(digest, r); err != nil {
			return err.Error(), nil
		}
		if !ok || sum != "" && sum != fmt.Sprintf("%x", digest.Sum(nil)) {
			return fmt.Sprintf("%q in the tar is not what was changed", h.Name), nil
		}
		delete(want, name)
	}
	for name := range want {
		return fmt.Sprintf("%d names are missing in the tar, such as %q", len(want), name), nil
	}
	return "", nil
}

// changesScenario measures a layer with few changes on a large one.
func changesScenario() scenario {
	return scenario{name: "changes", row: rowFewChanges, run: func(s *sample) error {
		if s.sys.role == tool {
			return nil
		}
		pl, err := makePlan(s.data.tree)
		if err != nil {
			return err
		}
		if err := s.open(false); err != nil {
			return err
		}
		if _, err := s.apply("base", "", false); err != nil {
			return err
		}
		if _, err := s.w.call(wire.Request{Op: wire.OpCreate, ID: "child", Parent: "base"}); err != nil {
			return err
		}
		res, err := s.w.call(wire.Request{Op: wire.OpGet, ID: "child"})
		if err != nil {
			return err
		}
		if err := pl.carryOut(res.Path); err != nil {
			return err
		}
		if _, err := s.w.call(wire.Request{Op: wire.OpPut, ID: "child"}); err != nil {
			return err
		}
		return s.few(pl)
	}}
}

func (s *sample) few(pl *plan) error {
	res, err := s.w.call(wire.Request{Op: wire.OpChanges, ID: "child", Parent: "base", Lines: true})
	if err != nil {
		return err
	}
	s.took(rowFewChanges, res.Wall)
	s.results.wrong(s.key(rowFewChanges), unitTime, pl.checkList(res.Lines))
	req := wire.Request{Op: wire.OpDiff, ID: "child", Parent: "base", Mode: wire.ModeLarge}
	if res, err = s.w.call(req); err != nil {
		s.results.fail(s.key(rowFewDiff), unitTime, err)
		return nil
	}
	s.took(rowFewDiff, res.Wall)
	if s.rep > 0 {
		return nil
	}
	req.Out = filepath.Join(s.dir, "diff.tar")
	if _, err := s.w.call(req); err != nil {
		s.results.fail(s.key(rowFewDiff), unitTime, err)
		return nil
	}
	why, err := pl.checkTar(req.Out, s.data.tree)
	s.results.wrong(s.key(rowFewDiff), unitTime, why)
	return err
}
