package archive

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"golang.org/x/sys/unix"
)

// TestCompareSameTick changes files through a mount as soon as they are made, so that copying up and
// changing fall into the tick of the clock in which the file itself was made: inode number, size, time of
// change and, in one case, time of content are the same then, and it is not the same file.
func TestCompareSameTick(t *testing.T) {
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		low, up, empty := filepath.Join(dir, "low"), filepath.Join(dir, "up"), filepath.Join(dir, "empty")
		before := overlaytest.Mount(t, []string{empty, low}, "", "", filepath.Join(dir, "before"))
		// The upper directory has been there for longer, as that of a layer has.
		after := overlaytest.Mount(t, []string{low}, up, filepath.Join(dir, "work"), filepath.Join(dir, "after"))
		const tries = 40
		then := unixTime(1_000_000_000)
		cases := map[string]func(path string) error{
			"content": func(path string) error { return overwrite(path, "bbbb") },
			"content, time kept": func(path string) error {
				if err := overwrite(path, "bbbb"); err != nil {
					return err
				}
				return os.Chtimes(path, time.Time{}, then)
			},
			"xattr": func(path string) error { return unix.Setxattr(path, "user.a", []byte("1"), 0) },
		}
		same, want := make(map[string]int), ""
		for name, change := range cases {
			for i := range tries {
				name := fmt.Sprintf("%s %d", name, i)
				file := filepath.Join(low, name)
				must(t, os.WriteFile(file, []byte("aaaa"), 0o644))
				if strings.Contains(name, "kept") {
					must(t, os.Chtimes(file, time.Time{}, then))
				}
				must(t, change(filepath.Join(after.Merged, name)))
				want += "C /" + name + "\n"
			}
		}
		for name := range cases {
			for i := range tries {
				name := fmt.Sprintf("%s %d", name, i)
				var a, b unix.Stat_t
				must(t, unix.Lstat(filepath.Join(after.Merged, name), &a))
				must(t, unix.Lstat(filepath.Join(before.Merged, name), &b))
				if a.Ino == b.Ino && a.Ctim == b.Ctim && a.Mtim == b.Mtim {
					same[name[:strings.LastIndexByte(name, ' ')]]++
				}
			}
		}
		t.Logf("of %d each, these looked like the same file: %v", tries, same)
		changes, err := Compare(context.Background(), after.Merged, before.Merged)
		must(t, err)
		if d := overlaytest.Diff(sortedLines(want), changeText(changes)); d != "" {
			t.Error(d)
		}
	})
}

func sortedLines(text string) string {
	lines := slices.Sorted(strings.Lines(text))
	return strings.Join(lines, "")
}

func overwrite(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return err
}
