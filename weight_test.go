package overlay2_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// The limits of what a program takes on that imports this package. Raise them only for what is worth that to all who
// import it; scripts/check.sh names the modules that may be linked.
const (
	maxModules = 7       // beside the library itself
	maxBytes   = 4 << 20 // of a stripped program without cgo, linux/amd64
)

// TestImportingWeight: how many modules a program links that imports this package, and how large it is.
// The peers' figures are in docs/performance.md, "As a dependency".
func TestImportingWeight(t *testing.T) {
	overlaytest.Require(t, "cmd:go")
	dir := t.TempDir()
	main, program := filepath.Join(dir, "main.go"), filepath.Join(dir, "program")
	const source = `package main

import (
	"fmt"
	"os"

	"github.com/bcc2decd/overlay2"
)

func main() {
	d, err := overlay2.New(os.Args[1], overlay2.Options{})
	fmt.Println(err, d.Create, d.CreateReadWrite, d.Get, d.Put, d.ApplyDiff, d.Diff, d.DiffSize, d.Changes, d.Remove, d.Mount, d.Check)
}
`
	if err := os.WriteFile(main, []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	goTool := func(args ...string) string {
		t.Helper()
		c := exec.Command("go", args...)
		c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
		var errs strings.Builder
		c.Stderr = &errs
		out, err := c.Output()
		if err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, errs.String())
		}
		return string(out)
	}
	modules := strings.Fields(goTool("list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", main))
	slices.Sort(modules)
	modules = slices.DeleteFunc(slices.Compact(modules), func(m string) bool { return m == "github.com/bcc2decd/overlay2" })
	goTool("build", "-trimpath", "-ldflags=-s -w", "-o", program, main)
	st, err := os.Stat(program)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d modules, %d bytes", len(modules), st.Size())
	if len(modules) > maxModules {
		t.Errorf("%d modules are linked, more than %d: %q", len(modules), maxModules, modules)
	}
	if st.Size() > maxBytes {
		t.Errorf("the program has %d bytes, more than %d", st.Size(), maxBytes)
	}
}
