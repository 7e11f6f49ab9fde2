package archive

import (
	"errors"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// TestLeaveFails: where directories cannot get their times in the end, each is closed all the same.
func TestLeaveFails(t *testing.T) {
	overlaytest.NoLeaks(t)
	b, err := newBuilder(&unpacker{ctx: t.Context()}, t.TempDir())
	must(t, err)
	must(t, b.walk("a/b/c/d/e", walkMake))
	for _, n := range b.stack[1:] {
		path, err := sys.Openat(n.fd, ".", unix.O_PATH|unix.O_DIRECTORY, 0) // has no times to be set
		must(t, err)
		must(t, sys.Close(n.fd))
		n.fd, n.dirty = path, true
	}
	if err := b.end(); !errors.Is(err, unix.EBADF) {
		t.Error(err)
	}
}
