package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// An image's record promises that its layers are on the disk, those too that a process has made that was killed before it
// had synced them.
func TestImportSyncsWhatItFinds(t *testing.T) {
	const variable = "OVERLAY2_TEST_NO_SYNC"
	if root := os.Getenv(variable); root != "" {
		overlaytest.Intercept(t, map[uint32]string{unix.SYS_SYNCFS: "syncfs"}, func(string) unix.Errno { return unix.EIO })
		if code := run(context.Background(), []string{"--root", root, "import", shipped, "--name", "a"}, nil, os.Stdout, os.Stderr); code != exitFailure {
			t.Errorf("code %d without a sync", code)
		}
		return
	}
	overlaytest.Require(t, "root", "seccomp")
	o := newTool(t)
	o.imported()
	record := filepath.Join(o.root, "images", "a.json")
	must(t, os.Remove(record)) // as a kill before it was written
	cmd := exec.Command(os.Args[0], "-test.run=^TestImportSyncsWhatItFinds$")
	cmd.Env = append(os.Environ(), variable+"="+o.root)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := os.Stat(record); err == nil {
		t.Error("the image has its name")
	}
	o.imported()
	o.do("rm", "a")
	o.empty()
}
