package overlay2

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

const (
	// cutHomeEnv is the home of TestGuestPower, cutModeEnv its durability, cutLayersEnv a file with what it said
	// of layers when it ran before.
	cutHomeEnv   = "OVERLAY2_TEST_CUT_HOME"
	cutModeEnv   = "OVERLAY2_TEST_CUT_MODE"
	cutLayersEnv = "OVERLAY2_TEST_CUT_LAYERS"
	// cutLine begins what it says: internal/vmtest reads it, and kills the guest at some line.
	cutLine = "VMCUT "
)

// TestGuestPower is what a guest runs until it is killed, again and again, by internal/vmtest -cuts: it
// looks at what the last cut has left, as TestPowerCut does, and then works and says what has returned.
func TestGuestPower(t *testing.T) {
	home := os.Getenv(cutHomeEnv)
	if home == "" {
		return // only a guest can be killed
	}
	overlaytest.Require(t, "root", "overlay")
	mode, err := parseDurability(os.Getenv(cutModeEnv))
	must(t, err)
	p := &powerTest{t: t, power: &overlaytest.Power{Dir: filepath.Dir(home)}, home: home, mode: mode, log: quietLog()}
	m := readCutModel(t, os.Getenv(cutLayersEnv))
	d := p.open(t)
	bad, count := p.verify(d, m)
	for _, s := range bad {
		t.Error(s)
	}
	if len(bad) > 0 {
		return
	}
	p.removeAll(t, d, m)
	d = p.open(t)
	must(t, d.Sync())
	fmt.Fprintf(os.Stdout, "\n%sfound %+v\n", cutLine, count)
	m = &powerModel{busy: map[string]int{}, told: map[string]string{}}
	m.tell = func(s string) { fmt.Fprintf(os.Stdout, "\n%slayer %s\n", cutLine, s) }
	var wg sync.WaitGroup
	for worker := range 3 {
		wg.Go(func() {
			for i := 0; ; i++ {
				if err := p.step(d, m, fmt.Sprintf("r-%d-%d", worker, i)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

const cutFormat = "%q %q %t %t %t %t %t %t %t %t"

// line returns all that is known of the layer, in one line.
func (l *powerLayer) line() string {
	return fmt.Sprintf(cutFormat, l.id, l.parent, l.readWrite, l.created, l.applied, l.applying, l.removing, l.syncedCreate, l.syncedApply, l.onDisk)
}

// tellChanges says of which layers more is known than was said.
func (m *powerModel) tellChanges() {
	if m.tell == nil {
		return
	}
	for _, l := range m.layers {
		if s := l.line(); m.told[l.id] != s {
			m.told[l.id] = s
			m.tell(s)
		}
	}
}

// readCutModel reads what was said of layers, the parents first, the latest of each.
func readCutModel(t *testing.T, file string) *powerModel {
	m := &powerModel{busy: map[string]int{}}
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return m
	}
	must(t, err)
	defer f.Close()
	known := map[string]*powerLayer{}
	for s := bufio.NewScanner(f); s.Scan(); {
		l := &powerLayer{}
		if _, err := fmt.Sscanf(strings.TrimSpace(s.Text()), cutFormat, &l.id, &l.parent, &l.readWrite, &l.created, &l.applied, &l.applying, &l.removing,
			&l.syncedCreate, &l.syncedApply, &l.onDisk); err != nil {
			t.Fatalf("%q: %v", s.Text(), err)
		}
		if known[l.id] == nil {
			known[l.id] = l
			m.layers = append(m.layers, l)
		}
		*known[l.id] = *l
	}
	return m
}
