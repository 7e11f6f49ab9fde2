package archive

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "rewrite what testdata/unpack expects")

// unpackCase is a file of testdata/unpack, in sections "-- NAME --":
//
//	what      why the case is there
//	options   words: format=user|merged, ids=CONTAINER:HOST:SIZE, nolowers
//	lower     a lower layer as overlaytest.Build takes it; may be repeated, nearest first
//	before    what the directory holds before
//	tar       as tarText takes it
//	error     names of what errors.Is must find, and the entry's quoted name
//	upper     the directory after, as overlaytest.Tree tells it
//	merged    the same of a real overlay of it over the lower layers, where the case has any
type unpackCase struct {
	sections [][2]string
}

func readCase(t *testing.T, path string) *unpackCase {
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	c := &unpackCase{}
	for line := range strings.Lines(string(data)) {
		if name, ok := strings.CutPrefix(strings.TrimRight(line, "\n"), "-- "); ok {
			c.sections = append(c.sections, [2]string{strings.TrimSuffix(name, " --"), ""})
			continue
		}
		if len(c.sections) == 0 {
			t.Fatalf("%s: text before the first section", path)
		}
		c.sections[len(c.sections)-1][1] += line
	}
	return c
}

func (c *unpackCase) get(name string) (string, bool) {
	for _, s := range c.sections {
		if s[0] == name {
			return s[1], true
		}
	}
	return "", false
}

func (c *unpackCase) all(name string) (texts []string) {
	for _, s := range c.sections {
		if s[0] == name {
			texts = append(texts, s[1])
		}
	}
	return texts
}

func (c *unpackCase) set(name, text string) {
	for i := range c.sections {
		if c.sections[i][0] == name {
			c.sections[i][1] = text
			return
		}
	}
	c.sections = append(c.sections, [2]string{name, text})
}

func (c *unpackCase) remove(name string) {
	c.sections = slices.DeleteFunc(c.sections, func(s [2]string) bool { return s[0] == name })
}

func (c *unpackCase) write(path string) error {
	var b strings.Builder
	for _, s := range c.sections {
		fmt.Fprintf(&b, "-- %s --\n%s", s[0], s[1])
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}

// options reads the section of that name.
func (c *unpackCase) options(t *testing.T) (opts UnpackOptions, lowers bool) {
	text, _ := c.get("options")
	lowers = true
	for _, word := range strings.Fields(text) {
		key, value, _ := strings.Cut(word, "=")
		switch key {
		case "nolowers":
			lowers = false
		case "format":
			opts.Format = map[string]Format{"user": OverlayUser, "merged": Merged}[value]
		case "ids":
			var r IDRange
			if _, err := fmt.Sscanf(value, "%d:%d:%d", &r.ContainerID, &r.HostID, &r.Size); err != nil {
				t.Fatal(err)
			}
			opts.IDMap.UIDs = append(opts.IDMap.UIDs, r)
			opts.IDMap.GIDs = append(opts.IDMap.GIDs, r)
		default:
			t.Fatalf("unknown option %q", word)
		}
	}
	return opts, lowers
}

var caseErrors = map[string]error{
	"ErrBreakout": ErrBreakout, "ErrInvalidWhiteout": ErrInvalidWhiteout, "ErrFormat": ErrFormat, "ErrUnmapped": ErrUnmapped,
	"ENOENT": unix.ENOENT, "ENOTDIR": unix.ENOTDIR, "ELOOP": unix.ELOOP, "EPERM": unix.EPERM, "ENAMETOOLONG": unix.ENAMETOOLONG,
	"EINVAL": unix.EINVAL, "ENODATA": unix.ENODATA, "EOPNOTSUPP": unix.EOPNOTSUPP, "EISDIR": unix.EISDIR,
}

// describe writes the names of what errors.Is finds, and the entry's name.
func describe(err error) string {
	if err == nil {
		return ""
	}
	var words []string
	for name, is := range caseErrors {
		if errors.Is(err, is) {
			words = append(words, name)
		}
	}
	slices.Sort(words)
	var entry *EntryError
	if errors.As(err, &entry) {
		words = append(words, strconv.Quote(entry.Name))
	}
	return strings.Join(words, " ") + "\n"
}

// TestUnpackCases unpacks each case on each filesystem, beside a canary that nothing may
// change, and mounts the result.
func TestUnpackCases(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	files, err := filepath.Glob("testdata/unpack/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no cases", err)
	}
	// Before Linux 6.7 a mount shows escaped xattrs escaped, or not at all.
	kernel, err := sys.Kernel()
	must(t, err)
	old := kernel.Less(sys.KernelVersion{Major: 6, Minor: 7})
	escaped := regexp.MustCompile(` (trusted|user)\.overlay\.[^ \n]*`)
	overlaytest.EachFS(t, func(t *testing.T, dir string) {
		overlaytest.NoLeaks(t)
		for i, file := range files {
			name := strings.TrimSuffix(filepath.Base(file), ".txt")
			t.Run(name, func(t *testing.T) {
				c := readCase(t, file)
				before := *c
				before.sections = slices.Clone(c.sections)
				c.run(t, filepath.Join(dir, strconv.Itoa(i)))
				if *update {
					if err := c.write(file); err != nil {
						t.Fatal(err)
					}
					return
				}
				for _, section := range []string{"error", "upper", "merged"} {
					want, _ := before.get(section)
					got, _ := c.get(section)
					if section == "merged" && old {
						want, got = escaped.ReplaceAllString(want, ""), escaped.ReplaceAllString(got, "")
					}
					if want != got {
						t.Errorf("%s:\n%s", section, overlaytest.Diff(want, got))
					}
				}
			})
		}
	})
}

// run unpacks the case in dir, and sets the sections that tell what came out.
func (c *unpackCase) run(t *testing.T, dir string) {
	opts, given := c.options(t)
	upper := filepath.Join(dir, "root", "upper")
	canary := "file secret \"do not touch\" user.canary=\"alive\"\ndir sub 0700\nfile sub/f \"x\"\nsymlink s -> root/upper\n"
	overlaytest.Build(t, filepath.Join(dir, "root"), canary)
	overlaytest.Build(t, dir, canary)
	if err := os.MkdirAll(upper, 0o755); err != nil {
		t.Fatal(err)
	}
	var lowers []string
	for i, text := range c.all("lower") {
		lower := filepath.Join(dir, fmt.Sprintf("lower%d", i))
		overlaytest.Build(t, lower, text)
		lowers = append(lowers, lower)
	}
	if given {
		opts.Lowers = lowers
	}
	outside := func() string {
		var b strings.Builder
		for _, d := range append([]string{dir, filepath.Join(dir, "root")}, lowers...) {
			for line := range strings.Lines(overlaytest.Tree(t, d, overlaytest.NoDirTimes)) {
				if !strings.Contains(line, "upper/") && !strings.Contains(line, `upper" `) {
					b.WriteString(line)
				}
			}
		}
		return b.String()
	}
	text, _ := c.get("tar")
	stream, err := tarText(text)
	if err != nil {
		t.Fatal(err)
	}
	base := overlaytest.NoTimes
	if text, ok := c.get("before"); ok {
		overlaytest.Build(t, upper, text)
	}
	// What the kernel may leave on the root is no concern of these cases.
	want := outside()
	stats, err := Unpack(context.Background(), upper, bytes.NewReader(stream), opts)
	if got := outside(); got != want {
		t.Errorf("outside of the root:\n%s", overlaytest.Diff(want, got))
	}
	c.remove("error")
	c.remove("upper")
	c.remove("merged")
	if err != nil {
		t.Log(err)
		c.set("error", describe(err))
		return
	}
	// xfs shows an ACL a second time.
	second := regexp.MustCompile(` trusted\.SGI_ACL_[A-Z]+="[^"]*"`)
	c.set("upper", second.ReplaceAllString(overlaytest.Tree(t, upper, base), ""))
	usage, err := Usage(context.Background(), upper)
	if err != nil {
		t.Fatal(err)
	}
	if opts.Format != Merged && usage.Size != stats.Size {
		t.Errorf("Stats.Size is %d, Usage says %d", stats.Size, usage.Size)
	}
	if len(lowers) > 0 && opts.Format != Merged {
		var options []string
		if opts.Format == OverlayUser {
			options = append(options, "userxattr")
		}
		o := overlaytest.Mount(t, lowers, upper, filepath.Join(dir, "work"), filepath.Join(dir, "merged"), options...)
		c.set("merged", overlaytest.Tree(t, o.Merged, base))
		o.Unmount()
	}
}
