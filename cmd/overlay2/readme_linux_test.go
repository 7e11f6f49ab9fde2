package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// blocks returns the README's code blocks of a language.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	must(t, err)
	var found []string
	for _, part := range strings.Split(string(b), "\n```"+language+"\n")[1:] {
		code, _, ok := strings.Cut(part, "\n```")
		if !ok {
			t.Fatal("a code block without end")
		}
		found = append(found, code)
	}
	return found
}

// The README's example is the one of example_test.go, which is run.
func TestReadmeExample(t *testing.T) {
	b, err := os.ReadFile("../../example_test.go")
	must(t, err)
	rest := string(b)
	for _, line := range strings.Split(blocks(t, "go")[0], "\n") {
		_, after, ok := strings.Cut(rest, "\t"+strings.TrimSpace(line)+"\n")
		if line != "" && !ok {
			t.Errorf("not in example_test.go, or not in this order: %q", line)
		}
		if ok {
			rest = after
		}
	}
}

// The README's commands do what they say, from the first to the last.
func TestReadmeCommands(t *testing.T) {
	overlaytest.Require(t, "root", "cmd:bash")
	o := newTool(t)
	dir := t.TempDir()
	top, err := filepath.Abs("../..")
	must(t, err)
	must(t, os.Symlink(filepath.Join(top, "testdata"), filepath.Join(dir, "testdata")))
	var commands string
	for _, b := range blocks(t, "sh") {
		if strings.Contains(b, "overlay2 import") {
			commands = b
		}
	}
	cmd := exec.Command("bash", "-euc", "overlay2() { "+helperVariable+"=1 \"$TOOL\" \"$@\"; }\n"+commands)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TOOL="+os.Args[0], rootVariable+"="+o.root)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v", err)
	}
	for _, want := range []string{"A greeting", "D motd", "mine.tar", "no problems"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	o.empty()
}
