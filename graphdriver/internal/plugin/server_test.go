//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bcc2decd/overlay2/internal/overlaytest"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// client calls a server as the daemon does.
type client struct {
	t *testing.T
	http.Client
}

// serve starts a server on a socket of its own.
func serve(t *testing.T, state string) client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s.sock")
	l, err := listen(socket)
	must(t, err)
	s, err := newServer(state)
	must(t, err)
	srv := &http.Server{Handler: s.handler()}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		must(t, srv.Close())
		<-done
		if d, err := s.opened(); err == nil {
			must(t, d.Cleanup())
		}
	})
	dial := func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) }
	return client{t, http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

func (c client) post(call, body string) *http.Response {
	c.t.Helper()
	r, err := c.Post("http://plugin/"+call, "application/json", strings.NewReader(body))
	must(c.t, err)
	return r
}

// call makes a call whose answer is JSON.
func (c client) call(call, body string) (a response) {
	c.t.Helper()
	r := c.post("GraphDriver."+call, body)
	defer r.Body.Close()
	must(c.t, json.NewDecoder(r.Body).Decode(&a))
	return a
}

// ok makes a call that must not fail.
func (c client) ok(call, body string) response {
	c.t.Helper()
	a := c.call(call, body)
	if a.Err != "" {
		c.t.Fatalf("%s %s: %s", call, body, a.Err)
	}
	return a
}

// fails makes a call whose error must say want.
func (c client) fails(want, call, body string) {
	c.t.Helper()
	if a := c.call(call, body); !strings.Contains(a.Err, want) {
		c.t.Errorf("%s %s: error %q, want one with %q", call, body, a.Err, want)
	}
}

func initBody(t *testing.T, home string, options ...string) string {
	t.Helper()
	b, err := json.Marshal(initRequest{Home: home, Opts: options})
	must(t, err)
	return string(b)
}

// TestProtocol: each call as the daemon makes it, and what it is told when it asks for what cannot be.
func TestProtocol(t *testing.T) {
	overlaytest.Require(t, "root")
	home := filepath.Join(t.TempDir(), "home")
	c := serve(t, filepath.Join(t.TempDir(), "state"))
	var a struct{ Implements []string }
	must(t, json.NewDecoder(c.post("Plugin.Activate", "").Body).Decode(&a))
	if !slices.Equal(a.Implements, []string{"GraphDriver"}) {
		t.Errorf("implements %q", a.Implements)
	}
	c.fails(errNoInit.Error(), "Create", `{"ID":"a"}`)
	c.fails("no Home", "Init", `{}`)
	c.fails("unexpected end", "Init", `{"Home":`)
	c.fails("overlay2.nonsense", "Init", initBody(t, home, "overlay2.nonsense=1"))
	c.fails("cannot unmarshal number -1", "Init", `{"Home":"`+home+`","UIDMaps":[{"container_id":-1,"host_id":0,"size":1}]}`)
	c.ok("Init", initBody(t, home))
	c.ok("Create", `{"ID":"a"}`)
	c.fails("layer exists", "Create", `{"ID":"a"}`)
	c.fails("layer not found", "Create", `{"ID":"b","Parent":"missing"}`)
	c.fails("invalid layer id", "Create", `{"ID":"../b"}`)
	c.fails("invalid option", "CreateReadWrite", `{"ID":"b","StorageOpt":{"colour":"red"}}`)
	c.fails("unexpected EOF", "Create", `{"ID":`)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, w.WriteHeader(&tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o644}))
	must(t, w.Close())
	c.ok("ApplyDiff?id=a&parent=", b.String())
	c.fails("unexpected EOF", "ApplyDiff?id=a&parent=", b.String()[:700])
	c.ok("ApplyDiff?id=a&parent=", b.String())
	c.ok("CreateReadWrite", `{"ID":"b","Parent":"a"}`)
	dir := c.ok("Get", `{"ID":"b"}`).Dir
	must(t, os.WriteFile(filepath.Join(dir, "g"), make([]byte, 8192), 0o644))
	if a := c.ok("Changes", `{"ID":"b","Parent":"a"}`); len(a.Changes) != 1 || a.Changes[0].Path != "/g" {
		t.Errorf("changes %v", a.Changes)
	}
	if a := c.ok("DiffSize", `{"ID":"b","Parent":"a"}`); a.Size != 8192 {
		t.Errorf("size %d", a.Size)
	}
	if a := c.ok("GetMetadata", `{"ID":"b"}`); a.Metadata["MergedDir"] != dir {
		t.Errorf("metadata %v", a.Metadata)
	}
	if len(c.ok("Status", `{}`).Status) == 0 || !c.ok("Exists", `{"ID":"b"}`).Exists || c.ok("Exists", `{"ID":"c"}`).Exists {
		t.Error("status or exists")
	}
	c.ok("Put", `{"ID":"b"}`)
	c.fails("not mounted", "Put", `{"ID":"b"}`)
	c.ok("Remove", `{"ID":"b"}`)
	c.ok("Cleanup", `{}`)
}

// TestBrokenDiff: what reads a Diff that cannot be whole is told, whether the error comes before the first byte or later.
func TestBrokenDiff(t *testing.T) {
	overlaytest.Require(t, "root")
	c := serve(t, filepath.Join(t.TempDir(), "state"))
	c.ok("Init", initBody(t, filepath.Join(t.TempDir(), "home")))
	r := c.post("GraphDriver.Diff", `{"ID":"missing"}`)
	b, err := io.ReadAll(r.Body)
	must(t, err)
	if r.StatusCode == http.StatusOK || !strings.Contains(string(b), "layer not found") {
		t.Errorf("diff of no layer: %s, %s", r.Status, b)
	}
	c.ok("CreateReadWrite", `{"ID":"a"}`)
	dir := c.ok("Get", `{"ID":"a"}`).Dir
	must(t, os.WriteFile(filepath.Join(dir, "a"), make([]byte, 1<<20), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "b"), nil, 0o644))
	r = c.post("GraphDriver.Diff", `{"ID":"a"}`)
	if n, err := io.Copy(io.Discard, r.Body); err != nil || n < 1<<20 {
		t.Errorf("diff: %d bytes, %v", n, err)
	}
	must(t, os.Rename(filepath.Join(dir, "b"), filepath.Join(dir, ".wh.b"))) // no tar can hold it
	must(t, os.Rename(filepath.Join(dir, "a"), filepath.Join(dir, ".a")))
	r = c.post("GraphDriver.Diff", `{"ID":"a"}`)
	if n, err := io.Copy(io.Discard, r.Body); r.StatusCode == http.StatusOK && err == nil {
		t.Errorf("diff with a file .wh.b: %d bytes and no error", n)
	}
	c.ok("Put", `{"ID":"a"}`)
}

// TestTakeOver: a server goes on where a dead one stopped, and only there.
func TestTakeOver(t *testing.T) {
	overlaytest.Require(t, "root")
	dir := t.TempDir()
	state, socket := filepath.Join(dir, "state"), filepath.Join(dir, "sock")
	c := serve(t, state)
	c.ok("Init", initBody(t, filepath.Join(dir, "home")))
	c.ok("Create", `{"ID":"a"}`)
	c = serve(t, state) // the other goes on: several processes may work on one home
	if !c.ok("Exists", `{"ID":"a"}`).Exists {
		t.Error("the layer is gone")
	}
	must(t, os.WriteFile(state, []byte("{broken"), 0o600))
	if _, err := newServer(state); err == nil || !strings.Contains(err.Error(), state) {
		t.Errorf("broken state: %v", err)
	}
	l, err := listen(socket)
	must(t, err)
	if _, err := listen(socket); err == nil || !strings.Contains(err.Error(), "another server") {
		t.Errorf("a socket that is in use: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	must(t, l.Close())
	l, err = listen(socket) // of a dead server
	must(t, err)
	must(t, l.Close())
	must(t, os.WriteFile(socket, nil, 0o600))
	if _, err := listen(socket); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("a file in place of the socket: %v", err)
	}
}
