//go:build linux

package overlay2_test

import (
	"fmt"
	"io"
	"log"
	"os"
	"testing"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// A base layer from a tar, a container's layer over it, and what was changed there. It needs root.
func Example() {
	d, err := overlay2.New("/tmp/overlay2-example", overlay2.Options{})
	check(err)
	defer func() { check(d.Cleanup()) }()

	rootfs, err := os.Open("testdata/example.tar")
	check(err)
	check(d.Create("base", "", nil))
	_, err = d.ApplyDiff("base", "", rootfs)
	check(err)

	check(d.CreateReadWrite("box", "base", nil))
	path, err := d.Get("box", "") // mounted here
	check(err)
	check(os.WriteFile(path+"/etc/motd", []byte("hello\n"), 0o644))
	check(os.Remove(path + "/etc/issue"))
	check(d.Put("box"))

	changes, err := d.Changes("box", "base")
	check(err)
	fmt.Println(changes) // [C /etc D /etc/issue A /etc/motd]
	diff, err := d.Diff("box", "base")
	check(err)
	_, err = io.Copy(io.Discard, diff) // a tar with whiteouts, for ApplyDiff elsewhere
	check(err)
	check(diff.Close())

	check(d.Remove("box"))
	check(d.Remove("base"))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// TestExample runs the example. It is not an example with an output, as those run without root too.
func TestExample(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	overlaytest.NoLeaks(t)
	stdout := os.Stdout
	defer func() { os.Stdout = stdout }()
	r, w, err := os.Pipe()
	check(err)
	os.Stdout = w
	Example()
	check(w.Close())
	out, err := io.ReadAll(r)
	check(err)
	check(r.Close())
	if got, want := string(out), "[C /etc D /etc/issue A /etc/motd]\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
	check(os.RemoveAll("/tmp/overlay2-example"))
}
