package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRepair: a dry run lists and changes nothing; then it is mended, and what cannot be is told.
func TestRepair(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "a")
	o.do("create", "box", "--from", "a")
	files, err := filepath.Glob(filepath.Join(o.root, "overlay2", "*", "link"))
	must(t, err)
	for _, f := range files {
		must(t, os.Truncate(f, 0))
	}
	code, dry, _ := o.try("repair", "--dry-run")
	if lost := strings.Count(dry, "/link: write "); code != exitFailure || lost != len(files) || lost < 2 {
		t.Errorf("dry run of %d: code %d, %s", len(files), code, dry)
	}
	if code, _, _ := o.try("check"); code != exitFailure {
		t.Errorf("check after a dry run: code %d", code)
	}
	listed, _, _ := strings.Cut(dry, "left: ")
	if out := o.do("repair"); out+"\n" != listed {
		t.Errorf("repair: %s\ndry run: %s", out, dry)
	}
	o.do("check")
	o.do("mount", "box")
	o.do("umount", "box")
	if out := o.do("repair"); out != "nothing to do" {
		t.Errorf("again: %s", out)
	}
	must(t, os.WriteFile(filepath.Join(o.root, "overlay2", "stray"), nil, 0o600))
	if code, out, said := o.try("repair"); code != exitFailure || !strings.HasPrefix(out, "left: stray: ") || !strings.Contains(said, "1 problems found") {
		t.Errorf("code %d, %s, %s", code, out, said)
	}
	must(t, os.Remove(filepath.Join(o.root, "overlay2", "stray")))
	o.do("rm", "box", "a")
	o.empty()
}
