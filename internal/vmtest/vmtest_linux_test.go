package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// console is what a guest prints: carriage returns, kernel messages, a test that is skipped
// and one that fails.
const console = "[    0.1] booting\r\n" + `
VMTEST start 6.1.0 4096

VMTEST run quota
=== RUN   TestA
    a_test.go:1: said in passing
--- PASS: TestA (0.00s)
=== RUN   TestB
=== RUN   TestB/x
    b_test.go:2: needs selinux: no such file
=== RUN   TestB/y
--- PASS: TestB (0.00s)
    --- SKIP: TestB/x (0.00s)
    --- PASS: TestB/y (0.00s)
=== RUN   TestC
    c_test.go:3: broken
--- FAIL: TestC (0.00s)
FAIL

VMTEST exit quota 1 0.5

VMTEST run .
PASS
VMTEST exit . 0 0.1
VMTEST end
`

func TestReport(t *testing.T) {
	r := &report{guest: guest{name: "g"}, out: io.Discard}
	if err := r.read(strings.NewReader(console)); err != nil {
		t.Fatal(err)
	}
	if !r.ended || !r.failed || r.kernel != "6.1.0" || len(r.runs) != 2 {
		t.Fatalf("%+v", r)
	}
	want := result{
		name: "quota", code: 1, seconds: 0.5, passed: 3, skipped: 1, done: true,
		skips: []string{"SKIP: TestB/x (0.00s): needs selinux: no such file"},
	}
	if !reflect.DeepEqual(r.runs[0], want) {
		t.Errorf("%+v", r.runs[0])
	}
}

func TestReportOfADyingGuest(t *testing.T) {
	for _, c := range []struct{ console, says string }{
		{"VMTEST start 6.1.0 4096\nVMTEST error mount xfs: no such device\nVMTEST end\n", "no such device"},
		{"VMTEST start garbage\n", "garbage"},
		{"VMTEST start 6.1.0 65536\n", "page size"},
		{"VMTEST start 6.1.0 4096\nVMTEST run a\nVMTEST exit a\n", `"a"`},
	} {
		r := &report{guest: guest{pageSize: 4096}, out: io.Discard}
		if err := r.read(strings.NewReader(c.console)); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v", c.console, err)
		}
	}
	r := &report{out: io.Discard}
	if err := r.read(strings.NewReader(strings.Repeat("line\n", 2*consoleLines))); err != nil || r.ended || len(r.console) != consoleLines {
		t.Errorf("%v %v, %d lines kept", err, r.ended, len(r.console))
	}
}

// TestInitrd spells out the bytes that the format asks for, of a file and its directory.
func TestInitrd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "initrd")
	rd, err := createInitrd(path)
	if err != nil {
		t.Fatal(err)
	}
	rd.data("/d/f", 0o644, []byte("hello"))
	rd.data("d/f", 0o644, []byte("again"))
	if err := rd.close(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	zeros := func(n int) string { return strings.Repeat("00000000", n) }
	want := "070701" + "00000001" + "000041ed" + zeros(2) + "00000001" + zeros(6) + "00000002" + zeros(1) + "d\x00" +
		"070701" + "00000002" + "000081a4" + zeros(2) + "00000001" + zeros(1) + "00000005" + zeros(4) + "00000004" + zeros(1) + "d/f\x00" + "\x00\x00" + "hello\x00\x00\x00" +
		"070701" + "00000003" + zeros(3) + "00000001" + zeros(6) + "0000000b" + zeros(1) + "TRAILER!!!\x00\x00\x00\x00"
	if !bytes.Equal(got, []byte(want)) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestChoose(t *testing.T) {
	names := func(o options) (names []string) {
		chosen, err := choose(o)
		if err != nil {
			return []string{err.Error()}
		}
		for _, g := range chosen {
			names = append(names, g.name)
		}
		return names
	}
	if got := names(options{}); !reflect.DeepEqual(got, []string{"uml-6.1", "qemu-6.12"}) {
		t.Errorf("the quick set is %q", got)
	}
	if got := names(options{all: true}); len(got) != len(guests()) {
		t.Errorf("all are %q", got)
	}
	if got := names(options{guests: "ppc64le-64k, uml-6.1"}); !reflect.DeepEqual(got, []string{"uml-6.1", "ppc64le-64k"}) {
		t.Errorf("two are %q", got)
	}
	if got := names(options{guests: "uml-6.1,vax"}); !strings.Contains(got[0], "vax") {
		t.Errorf("unknown: %q", got)
	}
}

// TestRunAll: guests run so many at a time, their lines are told apart, and each that fails is named.
func TestRunAll(t *testing.T) {
	var running, most atomic.Int32
	run := func(_ context.Context, _ options, g guest, out io.Writer) error {
		most.Store(max(most.Load(), running.Add(1)))
		defer running.Add(-1)
		time.Sleep(20 * time.Millisecond)
		if g.name == "b" {
			return errors.New("broken")
		}
		return nil
	}
	chosen := []guest{{name: "a"}, {name: "b"}, {name: "c"}, {name: "d"}}
	err := runAll(t.Context(), options{jobs: 2}, chosen, run)
	if err == nil || err.Error() != "b: broken" {
		t.Errorf("error %v", err)
	}
	if n := most.Load(); n > 2 {
		t.Errorf("%d guests at a time", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := runAll(ctx, options{jobs: 2}, chosen, run); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	var b bytes.Buffer
	out := &lineWriter{mu: new(sync.Mutex), w: &b, prefix: "g: "}
	fmt.Fprint(out, "one\ntwo\n")
	if b.String() != "g: one\ng: two\n" {
		t.Errorf("%q", b.String())
	}
}
