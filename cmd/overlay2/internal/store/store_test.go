package store

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "root"))
	must(t, err)
	must(t, s.Init())
	return s
}

func TestRecordsComeBack(t *testing.T) {
	s := open(t)
	id := strings.Repeat("ab", 32)
	config := `{"odd":  "bytes \u00e9 stay"}`
	img := &Image{Name: "host:5000/a/b:c+d", ID: digest.FromString(config), Config: Config(config), Layers: []string{id}, Imported: time.Unix(1, 0).UTC()}
	must(t, s.PutImage(img))
	got, err := s.Image(img.Name)
	must(t, err)
	if string(got.Config) != config || got.Layers[0] != id {
		t.Errorf("%+v", got)
	}
	must(t, s.PutLayer(&Layer{ID: id, Kind: KindImage}))
	must(t, s.PutLayer(&Layer{ID: "box", Parent: id, Kind: KindContainer, Binds: []string{"/x"}}))
	chain, err := s.Chain("box")
	must(t, err)
	if len(chain) != 2 || chain[1].ID != id {
		t.Errorf("%+v", chain)
	}
	for ref, want := range map[string]string{"box": "box", id: id, id[:4]: id, id[:3]: "", "nobody": "", "../x": "", "": ""} {
		l, err := s.Find(ref)
		if want == "" && !errors.Is(err, ErrNotFound) || want != "" && (err != nil || l.ID != want) {
			t.Errorf("find %q: %v, %v", ref, l, err)
		}
	}
	images, damaged, err := s.Images()
	must(t, err)
	layers, err := s.Layers()
	must(t, err)
	if len(images) != 1 || len(layers) != 2 || len(damaged) != 0 {
		t.Errorf("%d images, %d layers, %v", len(images), len(layers), damaged)
	}
	must(t, s.DeleteImage(img.Name))
	must(t, s.DeleteLayers("box"))
	must(t, s.DeleteLayers("box", id)) // twice is fine
	if _, err := s.Image(img.Name); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

// Configs are kept byte for byte: as text where JSON can hold them so, as it always was.
func TestConfigs(t *testing.T) {
	s := open(t)
	for i, config := range []string{"{}", "\u2028<&>\x00\"", "M\xfcller", "\xff\xfe", "{\"base64\":\"\"}", "\ufffd"} {
		must(t, s.PutImage(&Image{Name: "a", ID: digest.FromString(config), Config: Config(config)}))
		got, err := s.Image("a")
		must(t, err)
		must(t, s.PutLayer(&Layer{ID: "box", Kind: KindContainer, Config: Config(config)}))
		l, err := s.Layer("box")
		must(t, err)
		if string(got.Config) != config || string(l.Config) != config {
			t.Errorf("%d: %q became %q and %q", i, config, got.Config, l.Config)
		}
	}
	must(t, os.WriteFile(s.imagePath("a"), []byte(`{"name":"a","id":"`+digest.FromString("{ü}").String()+`","config":"{\u00fc}"}`), 0o600))
	if img, err := s.Image("a"); err != nil || img.Config != "{ü}" {
		t.Errorf("the former form: %+v, %v", img, err)
	}
}

func TestNames(t *testing.T) {
	for _, bad := range []string{"", "../x", "/x", "a b", "a\nb", "a\x1b[2J", "-x", ".x", strings.Repeat("x", 201)} {
		if err := CheckImageName(bad); !errors.Is(err, ErrName) {
			t.Errorf("image %q: %v", bad, err)
		}
	}
	for _, bad := range []string{"", "..", "a/b", "a:b", "-x", strings.Repeat("a", 64), strings.Repeat("x", 128)} {
		if err := CheckContainerName(bad); !errors.Is(err, ErrName) {
			t.Errorf("layer %q: %v", bad, err)
		}
	}
	if _, err := Open(""); !errors.Is(err, ErrName) {
		t.Error(err)
	}
}

// Records that were tampered with are named, and lead nowhere.
func TestDamagedRecords(t *testing.T) {
	for name, record := range map[string]string{
		"garbage":      "{{{",
		"other id":     `{"id":"other","kind":"container"}`,
		"parent climb": `{"id":"box","kind":"container","parent":"../../etc"}`,
		"wrong kind":   `{"id":"box","kind":"image"}`,
	} {
		s := open(t)
		must(t, os.WriteFile(s.layerPath("box"), []byte(record), 0o600))
		if _, err := s.Layer("box"); !errors.Is(err, ErrRecord) || !strings.Contains(err.Error(), "box.json") {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := s.Layers(); !errors.Is(err, ErrRecord) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := open(t)
	must(t, os.WriteFile(s.layerPath("box"), nil, 0o600)) // what a power cut may leave
	if l, err := s.Layer("box"); err != nil || !l.Pending {
		t.Errorf("an empty record: %+v, %v", l, err)
	}
	must(t, s.DeleteLayers("box"))
	must(t, os.WriteFile(s.imagePath("a"), []byte(`{"name":"a","id":"`+digest.FromString("x").String()+`","config":"y"}`), 0o600))
	if _, err := s.Image("a"); !errors.Is(err, ErrRecord) {
		t.Error(err)
	}
	must(t, os.WriteFile(filepath.Join(s.root, imageDir, "%zz.json"), []byte("{}"), 0o600))
	if all, damaged, err := s.Images(); err != nil || len(all) != 0 || len(damaged) != 2 || damaged[1].Name != "a" {
		t.Errorf("%v, %v, %v", all, damaged, err)
	}
	must(t, s.PutLayer(&Layer{ID: "a", Kind: KindContainer, Parent: "b"}))
	must(t, s.PutLayer(&Layer{ID: "b", Kind: KindContainer, Parent: "a"}))
	if _, err := s.Chain("a"); !errors.Is(err, ErrRecord) {
		t.Errorf("circle: %v", err)
	}
}

func TestLock(t *testing.T) {
	s := open(t)
	half := filepath.Join(s.root, layerDir, tempPrefix+"half")
	must(t, os.WriteFile(half, nil, 0o600))
	first, err := s.Lock(context.Background(), nil)
	must(t, err)
	if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
		t.Error("what a crash left is still there")
	}
	ctx, cancel := context.WithCancel(context.Background())
	if _, err := s.Lock(ctx, cancel); !errors.Is(err, context.Canceled) {
		t.Errorf("a second lock: %v", err)
	}
	must(t, first.Close())
	second, err := s.Lock(context.Background(), func() { t.Error("waits for nobody") })
	must(t, err)
	must(t, second.Close())
}
