//go:build linux

package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
)

// directory is as much of a system as these tests ask of one.
type directory struct {
	System
	closed int
}

func (d *directory) Create(id, _ string) error {
	if strings.HasPrefix(id, "bad") {
		return errors.New("bad id")
	}
	return nil
}

func (d *directory) DiffSize(string, string) (int64, error) { return 0, errors.ErrUnsupported }

func (d *directory) Diff(string, string) (io.ReadCloser, error) {
	return io.NopCloser(strings.NewReader(strings.Repeat("x", 100_000))), nil
}

func (d *directory) Close() error {
	d.closed++
	return nil
}

func TestServe(t *testing.T) {
	requests := []Request{
		{Op: "no such"},
		{Op: OpCreate, ID: "one"},
		{Op: OpCreate, ID: "bad"},
		{Op: OpCreate, ID: "many", Count: 3},
		{Op: OpDiffSize, ID: "one"},
		{Op: OpDiff, ID: "one", Mode: ModeLarge},
		{Op: OpDiff, ID: "one", Mode: ModePipe},
	}
	var in, out bytes.Buffer
	for _, r := range requests {
		if err := json.NewEncoder(&in).Encode(r); err != nil {
			t.Fatal(err)
		}
	}
	d := &directory{}
	if err := Serve(d, &in, &out); err != nil {
		t.Fatal(err)
	}
	if d.closed != 1 {
		t.Errorf("closed %d times", d.closed)
	}
	answers := make([]Response, len(requests))
	dec := json.NewDecoder(&out)
	for i := range answers {
		if err := dec.Decode(&answers[i]); err != nil {
			t.Fatal(i, err)
		}
	}
	if a := answers[0]; !strings.Contains(a.Err, "unknown request") {
		t.Errorf("%+v", a)
	}
	if a := answers[1]; a.Err != "" || a.Wall <= 0 || a.Peak <= 0 {
		t.Errorf("%+v", a)
	}
	if a := answers[2]; a.Err != "bad id" || a.Unsupported {
		t.Errorf("%+v", a)
	}
	if a := answers[3]; len(a.Samples) != 3 {
		t.Errorf("%+v", a)
	}
	if a := answers[4]; !a.Unsupported {
		t.Errorf("%+v", a)
	}
	for _, a := range answers[5:] {
		if a.Bytes != 100_000 || a.Err != "" {
			t.Errorf("%+v", a)
		}
	}
}

func TestServeGarbage(t *testing.T) {
	if err := Serve(&directory{}, strings.NewReader("{"), io.Discard); err == nil {
		t.Error("half a request is taken for one")
	}
}
