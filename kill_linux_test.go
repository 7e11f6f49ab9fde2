package overlay2

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/sirupsen/logrus"
)

// killHome is the home of the process that TestKill starts and kills; killName begins its layers' IDs.
const (
	killHome = "OVERLAY2_TEST_KILL_HOME"
	killName = "OVERLAY2_TEST_KILL_NAME"
)

// TestKillWorker is that process. It writes a line before each call that takes something
// away and after each that gives something.
func TestKillWorker(t *testing.T) {
	home := os.Getenv(killHome)
	if home == "" {
		return // run as a test of its own, it has nothing to do
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	d, err := New(home, Options{Log: logrus.NewEntry(log)})
	must(t, err)
	var mu sync.Mutex
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(os.Stdout, "\n"+format+"\n", args...)
	}
	var wg sync.WaitGroup
	for worker := range 3 {
		wg.Go(func() {
			parent := ""
			for i := 0; ; i++ {
				id := fmt.Sprintf("%s-%d-%d", os.Getenv(killName), worker, i)
				if err := killStep(t, d, say, id, parent); err != nil {
					say("error %v", err)
					return
				}
				if parent = ""; i%4 > 0 {
					parent = id
				}
			}
		})
	}
	wg.Wait()
}

// killStep makes and fills a layer, uses one above it, and removes what it does not leave as a parent.
func killStep(t *testing.T, d *Driver, say func(string, ...any), id, parent string) error {
	if err := d.Create(id, parent, nil); err != nil {
		return err
	}
	say("created %s %s", id, parent)
	data := makeTar(t, file("name", id), file("big", strings.Repeat(id, 5000)))
	if _, err := d.ApplyDiff(id, parent, bytes.NewReader(data)); err != nil {
		return err
	}
	say("applied %s", id)
	box, gone := id+"-box", id+"-gone"
	if err := errors.Join(d.CreateReadWrite(box, id, nil), d.CreateReadWrite(gone, id, nil)); err != nil {
		return err
	}
	say("created %s %s", box, id)
	path, err := d.Get(box, "")
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(path+"/written", []byte(id), 0o600), d.Put(box)); err != nil {
		return err
	}
	say("written %s", box)
	if rand.IntN(2) == 0 {
		if err := d.Sync(); err != nil {
			return err
		}
	}
	return d.Remove(gone)
}

// TestKill: a process is killed at any moment, again and again on the same home; nothing that
// had returned is lost, nothing is damaged, and the next process goes on.
func TestKill(t *testing.T) {
	overlaytest.Require(t, "root", "overlay")
	exe, err := os.Executable()
	must(t, err)
	home := overlaytest.MountFS(t, overlaytest.FS{Name: "ext4"})
	done := map[string]string{} // the last thing known of a layer
	layers, all := 0, cuts(t, 30)
	for round := range all {
		name := fmt.Sprintf("k%d", round)
		cmd := exec.Command(exe, "-test.run=^TestKillWorker$")
		cmd.Env = append(os.Environ(), killHome+"="+home, killName+"="+name)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := make(chan []string)
		go func() {
			var l []string
			for s := bufio.NewScanner(out); s.Scan(); {
				l = append(l, s.Text())
			}
			lines <- l
		}()
		time.Sleep(time.Duration(50+rand.IntN(400)) * time.Millisecond)
		must(t, cmd.Process.Kill())
		said := <-lines
		_ = cmd.Wait() // killed
		for _, line := range said {
			words := strings.Fields(line)
			switch {
			case len(words) < 2:
			case words[0] == "error":
				t.Error(line)
			case slices.Contains([]string{"created", "applied", "written"}, words[0]):
				done[words[1]] = words[0]
			}
		}
		verifyKilled(t, home, name, done)
		if t.Failed() {
			return
		}
		if round == all-1 || round%25 == 24 { // Check would take ever longer
			layers += len(done)
			removeKilled(t, home)
			clear(done)
			t.Logf("%d kills, %d layers", round+1, layers)
		}
	}
}

// removeKilled removes all layers that killed processes have left.
func removeKilled(t *testing.T, home string) {
	t.Helper()
	d := mustNew(t, home)
	for names := homeNames(t, d); len(names) > 0; {
		before := len(names)
		names = slices.DeleteFunc(names, func(id string) bool {
			err := d.Remove(id)
			if !errors.Is(err, ErrLayerInUse) { // by a child
				must(t, err)
			}
			return err == nil
		})
		if len(names) == before {
			t.Fatalf("cannot be removed: %q", names)
		}
	}
	must(t, d.Cleanup())
	wantEmptyHome(t, d)
}

// verifyKilled opens the home after a kill and looks at the layers of that round.
func verifyKilled(t *testing.T, home, name string, done map[string]string) {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	d, err := New(home, Options{Log: logrus.NewEntry(log)})
	must(t, err)
	problems, err := d.Check()
	must(t, err)
	for _, p := range problems {
		// What was worked on: an apply, a mount point about to be used.
		if errors.Is(p.Err, ErrIncomplete) && done[p.ID] != "applied" || strings.HasSuffix(p.Path, "/"+mergedName) {
			continue
		}
		t.Errorf("%s: check: %v", name, p)
	}
	for id, state := range done {
		if !strings.HasPrefix(id, name+"-") {
			continue
		}
		path, err := d.Get(id, "")
		if state == "created" && errors.Is(err, ErrIncomplete) {
			continue
		}
		if err != nil {
			t.Errorf("%s %s: %v", state, id, err)
			continue
		}
		if state == "applied" || state == "written" {
			want := strings.TrimSuffix(id, "-box")
			if data, err := os.ReadFile(path + "/name"); err != nil || string(data) != want {
				t.Errorf("%s %s: name holds %q: %v", state, id, data, err)
			}
			if st, err := os.Stat(path + "/big"); err != nil || st.Size() != int64(5000*len(want)) {
				t.Errorf("%s %s: big: %v", state, id, err)
			}
		}
		if state == "written" {
			if _, err := os.Stat(path + "/written"); err != nil {
				t.Errorf("%s: %v", id, err)
			}
		}
		for err = d.Put(id); err == nil; err = d.Put(id) { // and what the killed process had mounted
		}
		if !errors.Is(err, ErrNotMounted) {
			t.Errorf("put %s: %v", id, err)
		}
	}
	must(t, d.Cleanup())
}
