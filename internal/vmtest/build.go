//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// testBinary is the compiled tests of a package.
type testBinary struct {
	name string // path of the package within the module
	dir  string // its directory
	file string // the program
}

// build compiles the tests of all packages whose path has one of the prefixes, statically, so that they
// run in any guest of the architecture; and the guests' init. The tests are those of a nested module if one is named,
// and made with cgo, which moby needs for quotas: they are for a guest that sees the host's libraries.
func build(ctx context.Context, repo, module, out, arch string, prefixes []string) (tests []testBinary, guestInit string, err error) {
	dir, cgo := repo, "0"
	run := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo, "GOOS=linux", "GOARCH="+arch)
		cmd.Stderr = os.Stderr
		text, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("go %s: %w", strings.Join(args, " "), err)
		}
		return string(text), err
	}
	out = filepath.Join(out, arch)
	guestInit = filepath.Join(out, "guestinit")
	if _, err := run("build", "-buildvcs=false", "-o", guestInit, "github.com/bcc2decd/overlay2/internal/vmtest/guestinit"); err != nil {
		return nil, "", err
	}
	if module != "" {
		dir, cgo = filepath.Join(repo, module), "1"
	}
	list, err := run("list", "-f", "{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}\t{{.Module.Path}}\t{{.Dir}}{{end}}", "./...")
	if err != nil {
		return nil, "", err
	}
	for line := range strings.Lines(list) {
		field := strings.Split(strings.TrimSpace(line), "\t")
		if len(field) != 3 {
			continue
		}
		name := strings.TrimPrefix(strings.TrimPrefix(field[0], field[1]), "/")
		if name == "" {
			name = "."
		}
		if !selected(name, prefixes) || strings.HasPrefix(name, "internal/vmtest") {
			continue
		}
		b := testBinary{name: name, dir: field[2], file: filepath.Join(out, strings.ReplaceAll(name, "/", "-")+".test")}
		if _, err := run("test", "-c", "-o", b.file, field[0]); err != nil {
			return nil, "", err
		}
		tests = append(tests, b)
	}
	if len(tests) == 0 {
		return nil, "", fmt.Errorf("no package with tests among %q", prefixes)
	}
	return tests, guestInit, nil
}

// selected reports whether a name is one of the list; an empty list has all.
func selected(name string, list []string) bool {
	for _, p := range list {
		if name == p {
			return true
		}
	}
	return len(list) == 0
}
