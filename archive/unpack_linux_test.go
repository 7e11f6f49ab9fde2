package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

// entry is one entry of a tar in a test.
type entry struct {
	tar.Header
	body string
}

var testTime = time.Unix(1000000000, 0)

// makeTar writes the entries as Go's archive/tar does, in PAX where that is needed.
func makeTar(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.body))
		if h.ModTime.IsZero() {
			h.ModTime = testTime
		}
		if h.ModTime.Nanosecond() != 0 {
			h.Format = tar.FormatPAX
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func reg(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, body}
}

func dir(name string) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}, ""}
}

func TestUnpackSimple(t *testing.T) {
	overlaytest.NoLeaks(t)
	root := t.TempDir()
	stream := makeTar(t, dir("."), dir("a"), reg("a/b", "hello"), reg("c/d/e", "x"),
		entry{tar.Header{Typeflag: tar.TypeSymlink, Name: "s", Linkname: "a"}, ""},
		entry{tar.Header{Typeflag: tar.TypeLink, Name: "l", Linkname: "/a/b"}, ""},
		reg("s/f", "through"))
	st, err := Unpack(context.Background(), root, bytes.NewReader(stream), UnpackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v\n%s", st, overlaytest.Tree(t, root))
}
