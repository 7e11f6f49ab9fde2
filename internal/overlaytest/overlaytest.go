// Package overlaytest is what the tests of this module share: what a test needs and
// what this machine has (Require), directories on real filesystems (EachFS, MountFS),
// trees as text (Build, Tree, Compare), real overlay mounts (Mount), random operations
// on a tree (Random, Apply) and a check that a test leaves nothing behind (NoLeaks).
//
// Only tests import it, those of nested modules too. It is the one place that may skip a test, and three
// variables of the environment govern it:
//
//	OVERLAY2_TEST_REQUIRE   list of needs, or "all": a test that lacks one of them fails
//	                        instead of being skipped
//	OVERLAY2_TEST_FS        list of filesystems that EachFS is limited to
//	OVERLAY2_TEST_DIR_EXT4  a directory on such a filesystem, mounted by whoever runs the
//	                        tests, to use instead of a loop device (also _XFS, _BTRFS, _TMPFS)
//
// Lists are separated by commas. The package keeps no state of its own.
package overlaytest

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// requireEnv names the needs whose absence is a failure.
const requireEnv = "OVERLAY2_TEST_REQUIRE"

// Require makes sure that the machine has all of needs, each found out by trying:
//
//	linux     the kernel is Linux
//	root      the process has user id 0
//	proc      /proc is mounted
//	overlay   an overlay of two lower directories can be mounted
//	tmpfs     a tmpfs can be mounted
//	ext4, xfs, btrfs   such a filesystem can be made and mounted on a loop device, or a
//	          directory of it is given by OVERLAY2_TEST_DIR_...
//	loop      a free loop device can be had
//	userns    a process can be started in a user namespace of its own
//	idmap     mounts with mapped owners (the kernel has them; not every filesystem)
//	mknod     character devices can be made
//	seccomp   system calls can be intercepted (Linux 5.19)
//	selinux   SELinux is on
//	quota     xfs has project quotas
//	quota-ext4  ext4 has project quotas
//	dockerd   Docker's daemon, its client, containerd and runc are installed
//	clients   OVERLAY2_TEST_CLIENTS asks for tests with other programs, which take minutes
//
// A need that starts with "cmd:" is a program that must be in PATH, "cmd:mkfs.xfs".
//
// When one is missing the test is skipped with a message that says what is missing and
// why; it fails if OVERLAY2_TEST_REQUIRE names the need or is "all".
func Require(t testing.TB, needs ...string) {
	t.Helper()
	for _, need := range needs {
		if err := probe(t, need); err != nil {
			Missing(t, need, err)
		}
	}
}

// Missing is what Require does about a need that is missing, for those that only the test can find out: it
// skips the test, or fails it if OVERLAY2_TEST_REQUIRE names the need.
func Missing(t testing.TB, need string, why error) {
	t.Helper()
	if required(os.Getenv(requireEnv), need) {
		t.Fatalf("%s is required by %s and missing: %v", need, requireEnv, why)
	}
	t.Skipf("needs %s: %v", need, why)
}

// required reports whether the list, a value of OVERLAY2_TEST_REQUIRE, names the need.
func required(list, need string) bool {
	names := fields(list)
	return slices.Contains(names, "all") || slices.Contains(names, need)
}

// fields splits a list at its commas and trims blanks.
func fields(list string) []string {
	var names []string
	for name := range strings.SplitSeq(list, ",") {
		if name = strings.TrimSpace(name); name != "" {
			names = append(names, name)
		}
	}
	return names
}

// Names returns n different names of a single path element: short and long ones, such
// that sort differently by bytes than by people, with blanks, separators of mount options, control
// characters and bytes that are not UTF-8. The same n gives the same names.
func Names(n int) []string {
	odd := []string{
		"a", "b", "A", "a.b", "a-b", "a b", " lead", "trail ", "comma,", "colon:", `back\slash`, "new\nline",
		"tab\t", "quote\"", "star*", "-dash", "\xff\xfe", "\u00e4\u00f6\u00fc", "\u65e5\u672c", "...", "..a", ".wh", ".whx", "%41",
		"esc\x1b[31m", "=", strings.Repeat("n", 100), strings.Repeat("m", 255),
	}
	names := make([]string, n)
	for i := range names {
		names[i] = odd[i%len(odd)]
		if round := i / len(odd); round > 0 {
			suffix := fmt.Sprintf("~%d", round)
			names[i] = names[i][:min(len(names[i]), 255-len(suffix))] + suffix
		}
	}
	return names
}
