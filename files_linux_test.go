package overlay2

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"testing"
)

// TestFiles: each regular file of a layer's tar is read by its name, whatever the layers below have there;
// what is none is an error, and the layer stays until Close.
func TestFiles(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	apply(t, d, "base", "", makeTar(t, file("etc/", ""), file("etc/passwd", "old"), file("etc/only", "base"),
		tarEntry{Header: tar.Header{Name: "lib", Typeflag: tar.TypeSymlink, Linkname: "usr/lib"}}, file("usr/lib/", "")))
	data := makeTar(t, file("etc/passwd", "new"), file("./etc/dotted", "dot"), file("lib/so", "through the symlink"),
		tarEntry{Header: tar.Header{Name: "dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
		tarEntry{Header: tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: "/etc"}})
	apply(t, d, "layer", "base", data)
	files, err := d.Files("layer")
	must(t, err)
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		f, err := files.Open(h.Name)
		if h.Typeflag != tar.TypeReg {
			if err == nil {
				t.Errorf("%s was opened", h.Name)
			}
			continue
		}
		must(t, err)
		want, err := io.ReadAll(r)
		must(t, err)
		got, err := io.ReadAll(f)
		must(t, errors.Join(err, f.Close()))
		if !bytes.Equal(got, want) {
			t.Errorf("%s holds %q, want %q", h.Name, got, want)
		}
	}
	for _, name := range []string{"etc/missing", "etc", "../../etc/passwd/x", "out/hostname", ""} {
		f, err := files.Open(name)
		if err == nil {
			t.Errorf("%q was opened", name)
			must(t, f.Close())
		}
		var le *LayerError
		if !errors.As(err, &le) || le.ID != "layer" {
			t.Errorf("%q: %v", name, err)
		}
	}
	_, err = files.Open("etc/missing")
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "etc/missing") {
		t.Errorf("error %v", err)
	}
	wantErr(t, d.Remove("layer"), ErrLayerInUse)
	must(t, files.Close())
	must(t, files.Close())
	if _, err := files.Open("etc/passwd"); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	must(t, d.Remove("layer"))
	_, err = d.Files("layer")
	wantErr(t, err, ErrLayerNotFound)
}

// TestFilesDeep: layers with several ancestors have files too.
func TestFilesDeep(t *testing.T) {
	d := newTestDriver(t, t.TempDir(), Options{})
	top := deepChain(t, d, 4)
	f, err := d.Files(top)
	must(t, err)
	r, err := f.Open("same")
	must(t, err)
	data, err := io.ReadAll(r)
	must(t, errors.Join(err, r.Close(), f.Close()))
	if string(data) != top {
		t.Errorf("got %q", data)
	}
}
