package archive

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// long is a path of 300 bytes.
var long = strings.Repeat("0123456789abcde/", 18) + "twelve-bytes"

// everything is a tree with all that a tar can hold.
var everything = `
dir  . 0711 uid=5 gid=6 user.root="r"
dir  bin 0755
file bin/su 04755 "setuid" uid=0 gid=7 security.capability="\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
file bin/sg 02711 "setgid" gid=12
dir  tmp 01777 mtime=1700000000.123456789
file old "before 1970" mtime=-5.250000000
file zero mtime=0.000000001
file future "2242 and later" mtime=8589934592.5
file uid 0600 "big ids" uid=3000000000 gid=2097152
file acl "acl" system.posix_acl_access="\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\x07\x00\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"
dir  acls 0750 system.posix_acl_default="\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff\x08\x00\x06\x00\xa0\x86\x01\x00\x10\x00\x07\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
file attrs "x" user.a="1" user.b="two\nlines\x00" user.empty="" trusted.t="t"
link bin/link -> bin/su
symlink lib -> usr/lib
symlink dangling -> ../../etc/shadow uid=8 gid=9 mtime=77.000000007
symlink far -> ` + long + `
link far2 -> far
char dev/null 0666 1:3
block dev/sda 0660 8:0 gid=6
link dev/null2 -> dev/null
fifo run/pipe 0620
file "odd \xff\xfe name" "bytes"
file "new\nline" "n"
file "eq=x" "e" "user.k=v"="w"
file ` + long + ` "deep"
dir  ` + strings.Repeat("d", 99) + ` 0700
dir  ` + strings.Repeat("e", 120) + ` 0700
file ` + strings.Repeat("f", 255) + ` "long"
file sparse size=10M data=5M:"x" data=0:"begin"
file tail size=3M data=1M:"end" mtime=3.5
file hole size=200K
file small size=8K data=4K:"s"
`

// GNU tar and bsdtar make the same tree of it, with all metadata.
func TestPackReadByOthers(t *testing.T) {
	overlaytest.Require(t, "root", "tmpfs")
	for _, c := range []struct {
		program string
		args    []string
		// without are names that the program gets wrong: bsdtar doesn't keep the root's time,
		// and reads -5.25 as -5 + 0.25.
		without []string
	}{
		{"tar", []string{"--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "-", "-C"}, nil},
		{"tar", []string{"--acls", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "-", "-C"}, nil},
		{"bsdtar", []string{"--numeric-owner", "-xpf", "-", "-C"}, []string{".", "old"}},
	} {
		t.Run(c.program+c.args[0], func(t *testing.T) {
			overlaytest.Require(t, "cmd:"+c.program)
			base := overlaytest.MountFS(t, overlaytest.FS{Name: "tmpfs"})
			from, to := filepath.Join(base, "from"), filepath.Join(base, "to")
			overlaytest.Build(t, from, everything)
			must(t, os.Mkdir(to, 0o755))
			cmd := exec.Command(c.program, append(c.args, to)...)
			cmd.Stdin = bytes.NewReader(packed(t, from, PackOptions{}))
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			overlaytest.Compare(t, without(overlaytest.Tree(t, from), c.without), without(overlaytest.Tree(t, to), c.without))
			if got, want := blocks(t, to, "sparse"), blocks(t, from, "sparse"); got > want+64 {
				t.Errorf("sparse file: %d blocks, was %d", got, want)
			}
		})
	}
}

// without leaves the lines of some names out of a tree.
func without(tree string, names []string) string {
	var out []string
	for line := range strings.Lines(tree) {
		if name, _, _ := strings.Cut(line, " "); !slices.Contains(names, strings.Trim(name, `"`)) {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}
