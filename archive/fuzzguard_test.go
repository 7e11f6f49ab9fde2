package archive

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"
)

const (
	// fuzzPatience is how long one input may take. It takes milliseconds; a machine that is busy, or a
	// fuzzer that was suspended, must not look like a hang.
	fuzzPatience = time.Minute
	// fuzzMemory is what one input of at most 64 KiB may make the package allocate, freed or not: some
	// hundred times as much, for headers that say much in a few bytes.
	fuzzMemory = 8 << 20
)

// watched runs f and fails with the stacks of all goroutines if it hangs: the fuzzer itself
// would only say that its process hung or was terminated, and keep no input.
func watched(t *testing.T, f func()) {
	t.Helper()
	ended := make(chan any, 1)
	go func() {
		defer func() {
			p := recover()
			if p != nil {
				p = fmt.Sprintf("%v\n%s", p, debug.Stack())
			}
			ended <- p
		}()
		f()
	}()
	patience := time.NewTimer(fuzzPatience)
	defer patience.Stop()
	select {
	case p := <-ended:
		if p != nil {
			panic(p)
		}
	case <-patience.C:
		stacks := make([]byte, 1<<20)
		t.Fatalf("still not done after %v:\n%s", fuzzPatience, stacks[:runtime.Stack(stacks, true)])
	}
}

// bounded runs f and fails if it allocates more than an input of a fuzz test may.
func bounded(t *testing.T, f func()) {
	t.Helper()
	before := allocated()
	f()
	if n := allocated() - before; n > fuzzMemory {
		t.Errorf("allocated %d MiB", n>>20)
	}
}

// allocated returns how many bytes were ever allocated on the heap, freed or not.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// TestWatched holds that the guard of the fuzz tests sees what it is for.
func TestWatched(t *testing.T) {
	ran := false
	watched(t, func() { ran = true })
	if !ran {
		t.Error("not run")
	}
	if p := recovered(func() { watched(t, func() { panic("odd") }) }); p == nil {
		t.Error("a panic was lost")
	}
	before := allocated()
	buf := make([]byte, fuzzMemory)
	if n := allocated() - before; n < uint64(len(buf)) {
		t.Errorf("%d bytes counted of %d", n, len(buf))
	}
}

func recovered(f func()) (p any) {
	defer func() { p = recover() }()
	f()
	return nil
}
