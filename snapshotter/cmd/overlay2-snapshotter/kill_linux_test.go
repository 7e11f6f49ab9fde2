package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/bcc2decd/overlay2"
	"github.com/bcc2decd/overlay2/internal/overlaytest"
	"github.com/bcc2decd/overlay2/snapshotter"
	"github.com/containerd/containerd/v2/core/snapshots"
)

// cutsEnv says how often TestKill kills; 12 times without.
const cutsEnv = "OVERLAY2_TEST_CUTS"

// TestKill kills a plugin with SIGKILL at random moments, under load. Each call that has ended well has happened, a call that was
// cut off has happened or not, committed snapshots hold their files, and layers and records fit each other.
func TestKill(t *testing.T) {
	overlaytest.Require(t, "root")
	cuts := 12
	if n, err := strconv.Atoi(os.Getenv(cutsEnv)); err == nil && n > 0 {
		cuts = n
	}
	dir := t.TempDir()
	m := &model{have: map[string]state{}, unsure: map[string][]state{}}
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	for round := range cuts {
		p := start(t, dir)
		m.verify(t, p.Snapshotter)
		var wg sync.WaitGroup
		for i := range 4 {
			w := worker{m: m, sn: p.Snapshotter, r: rand.New(rand.NewPCG(seed, uint64(round*4+i))), prefix: fmt.Sprintf("r%dw%d-", round, i)}
			wg.Go(w.run)
		}
		time.Sleep(time.Duration(r.IntN(700)) * time.Millisecond)
		must(t, p.cmd.Process.Signal(syscall.SIGKILL))
		<-p.done
		wg.Wait()
		_ = p.conn.Close()
		if t.Failed() {
			return
		}
	}
	var log strings.Builder
	sn, err := snapshotter.New(filepath.Join(dir, "root"), snapshotter.Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	must(t, err)
	m.verify(t, sn)
	must(t, sn.Cleanup(context.Background()))
	problems, err := overlay2.CheckHome(filepath.Join(dir, "root", "layers"))
	must(t, err)
	for _, p := range problems {
		t.Errorf("check: %v", p)
	}
	if strings.Contains(log.String(), "level=ERROR") {
		t.Error(log.String())
	}
	t.Logf("%d kills, %d calls ended well, %d snapshots in the end", cuts, m.calls, len(m.have))
	must(t, sn.Close())
}

// state is what is known of a snapshot.
type state struct {
	kind   snapshots.Kind // 0: there is none
	parent string
}

// model is what there must be.
type model struct {
	mu     sync.Mutex
	have   map[string]state
	unsure map[string][]state // what calls that were cut off may have made of a name
	calls  int
}

// begin notes that a call may make this of names. It returns what notes that it has ended.
func (m *model) begin(names map[string]state) (end func(err error)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, s := range names {
		m.unsure[name] = append(m.unsure[name], s)
	}
	return func(err error) {
		m.mu.Lock()
		defer m.mu.Unlock()
		if err != nil {
			return // it may have happened: verify finds out
		}
		m.calls++
		for name, s := range names {
			delete(m.unsure, name)
			m.set(name, s)
		}
	}
}

func (m *model) set(name string, s state) {
	if s.kind == 0 {
		delete(m.have, name)
	} else {
		m.have[name] = s
	}
}

// committed returns a committed snapshot, or "".
func (m *model) committed(r *rand.Rand) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for name, s := range m.have {
		if s.kind == snapshots.KindCommitted {
			names = append(names, name)
		}
	}
	if len(names) == 0 || r.IntN(5) == 0 {
		return ""
	}
	slices.Sort(names)
	return names[r.IntN(len(names))]
}

// worker makes calls until one fails because the plugin is gone.
type worker struct {
	m      *model
	sn     snapshots.Snapshotter
	r      *rand.Rand
	prefix string
	n      int
}

func (w *worker) run() {
	for w.step() == nil {
	}
}

// step takes a snapshot of a few files from its making to its end, or a part of that way.
func (w *worker) step() error {
	ctx := context.Background()
	w.n++
	key, name := fmt.Sprintf("%sa%d", w.prefix, w.n), fmt.Sprintf("%sc%d", w.prefix, w.n)
	parent := w.m.committed(w.r)
	later := "" // the parent that is given when it is committed
	if parent != "" && w.r.IntN(3) == 0 {
		parent, later = "", parent
	}
	if w.r.IntN(4) == 0 {
		return w.view(key, parent)
	}
	end := w.m.begin(map[string]state{key: {snapshots.KindActive, parent}})
	mounts, err := w.sn.Prepare(ctx, key, parent, snapshots.WithLabels(map[string]string{"containerd.io/snapshot/parent-chain-id": later}))
	end(err)
	if err != nil {
		return err
	}
	if err := write(mounts, func(dir string) error { return os.WriteFile(filepath.Join(dir, "file-"+name), []byte(name), 0o644) }); err != nil {
		return err
	}
	switch w.r.IntN(5) {
	case 0:
		return nil // it stays
	case 1:
		end := w.m.begin(map[string]state{key: {}})
		err := w.sn.Remove(ctx, key)
		end(err)
		return err
	}
	var opts []snapshots.Opt
	now := parent
	if later != "" {
		now = later
		opts = append(opts, snapshots.WithParent(later))
	}
	end = w.m.begin(map[string]state{key: {}, name: {snapshots.KindCommitted, now}})
	err = w.sn.Commit(ctx, name, key, opts...)
	end(err)
	return err
}

func (w *worker) view(key, parent string) error {
	ctx := context.Background()
	end := w.m.begin(map[string]state{key: {snapshots.KindView, parent}})
	_, err := w.sn.View(ctx, key, parent)
	end(err)
	if err != nil || w.r.IntN(2) == 0 {
		return err
	}
	end = w.m.begin(map[string]state{key: {}})
	err = w.sn.Remove(ctx, key)
	end(err)
	if err == nil && w.r.IntN(4) == 0 {
		err = w.sn.(snapshots.Cleaner).Cleanup(ctx)
	}
	return err
}

// verify compares what there is with what there must be, and takes over what calls that were cut off have made.
func (m *model) verify(t *testing.T, sn snapshots.Snapshotter) {
	t.Helper()
	ctx := context.Background()
	have := map[string]state{}
	must(t, sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		have[info.Name] = state{info.Kind, info.Parent}
		return nil
	}))
	for name, states := range m.unsure {
		if now := have[name]; now == m.have[name] || slices.Contains(states, now) {
			m.set(name, now)
		} else {
			t.Errorf("%s is %v, it was %v and may be %v", name, now, m.have[name], states)
		}
	}
	m.unsure = map[string][]state{}
	if !maps.Equal(have, m.have) {
		t.Errorf("there is %v, there must be %v", have, m.have)
	}
	for name, s := range m.have {
		if s.kind != snapshots.KindCommitted {
			if _, err := sn.Mounts(ctx, name); err != nil {
				t.Error(err)
			}
		}
	}
	m.verifyFiles(t, sn)
}

// verifyFiles looks at the files of some committed snapshots, through a view of them.
func (m *model) verifyFiles(t *testing.T, sn snapshots.Snapshotter) {
	t.Helper()
	ctx := context.Background()
	seen := 0
	for name, s := range m.have {
		if s.kind != snapshots.KindCommitted {
			continue
		}
		if seen++; seen > 8 {
			return
		}
		key := "verify-" + name
		mounts, err := sn.View(ctx, key, name)
		must(t, err)
		must(t, write(mounts, func(dir string) error {
			for at := name; at != ""; at = m.have[at].parent {
				data, err := os.ReadFile(filepath.Join(dir, "file-"+at))
				if err != nil || string(data) != at {
					t.Errorf("%s holds %q for %s: %v", name, data, at, err)
				}
			}
			return nil
		}))
		must(t, sn.Remove(ctx, key))
	}
}
