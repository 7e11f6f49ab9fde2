package graphdriver

import (
	"testing"

	"golang.org/x/sys/unix"
)

// owner returns the uid of a file.
func owner(t *testing.T, path string) uint32 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return st.Uid
}
