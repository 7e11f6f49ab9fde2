package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestVerify: what was imported with digests verifies until something changes; what and where is told.
func TestVerify(t *testing.T) {
	o := newTool(t)
	o.do("import", shipped, "--name", "a", "--record-digests")
	o.do("create", "box", "--from", "a")
	var list struct {
		Layers []struct{ ID, Status string }
	}
	o.json(&list, "verify", "a")
	if len(list.Layers) < 2 {
		t.Fatalf("layers %v", list)
	}
	for _, l := range list.Layers {
		if l.Status != "ok" {
			t.Errorf("%s: %s", l.ID, l.Status)
		}
	}
	if all := o.do("verify"); strings.Count(all, ": ok") != len(list.Layers) || !strings.Contains(all, "box: no digests") {
		t.Errorf("all: %s", all)
	}
	if code, _, said := o.try("verify", "box"); code != exitFailure || !strings.Contains(said, "box: no digests are recorded") {
		t.Errorf("code %d: %s", code, said)
	}
	if code, _, _ := o.try("verify", "none"); code != exitNotFound {
		t.Errorf("none: code %d", code)
	}
	top := list.Layers[len(list.Layers)-1].ID
	changed := filepath.Join(o.root, "overlay2", top, "diff", "new\x1b\n")
	must(t, os.WriteFile(changed, nil, 0o600))
	code, out, said := o.try("verify", "a")
	if code != exitFailure || !strings.Contains(out, `new\x1b\n": extra`) || !strings.Contains(out, top+": different") || !strings.Contains(said, "1 layers with differences found") {
		t.Errorf("code %d: %s%s", code, out, said)
	}
	if code, out, _ := o.try("--json", "verify", top); code != exitFailure || !strings.Contains(out, `"different"`) || !strings.Contains(out, `"extra"`) {
		t.Errorf("code %d: %s", code, out)
	}
	o.do("verify", "--record", "a", "box")
	o.do("verify", "a", "box")
	o.do("rm", "box", "a")
	o.empty()
}
