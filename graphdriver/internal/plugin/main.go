//go:build linux

// Command plugin serves an overlay2.Driver to an unmodified dockerd as a storage driver plugin: JSON over HTTP on a unix
// socket. It is there for tests; plugins of this kind ended with Docker 28.
//
//	plugin -socket /run/docker/plugins/NAME.sock -state FILE
//	dockerd --experimental --storage-driver NAME ...
//
// A server that dies may be started again at any time, with the same state file. The daemon waits for it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"
)

func main() {
	socket := flag.String("socket", "", "socket to listen on; its name without .sock is the driver's")
	state := flag.String("state", "", "file that keeps what the daemon said at its start")
	flag.Parse()
	if *socket == "" || *state == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*socket, *state); err != nil {
		fmt.Fprintln(os.Stderr, "plugin:", err)
		os.Exit(1)
	}
}

func run(socket, state string) error {
	l, err := listen(socket)
	if err != nil {
		return err
	}
	s, err := newServer(state)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	srv := &http.Server{Handler: s.handler()} //nolint:gosec // a layer may take any time
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT)
	done := make(chan error, 1)
	go func() {
		<-stop
		done <- srv.Shutdown(context.Background()) // calls under way end first
	}()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	err = <-done
	if d, noInit := s.opened(); noInit == nil {
		err = errors.Join(err, d.Cleanup())
	}
	return err
}

// listen takes the socket over from a server that is dead, never from one that lives.
func listen(socket string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return nil, err
	}
	st, err := os.Lstat(socket)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case st.Mode().Type() != os.ModeSocket:
		return nil, fmt.Errorf("%s is no socket", socket)
	default:
		if c, err := net.Dial("unix", socket); err == nil {
			return nil, errors.Join(fmt.Errorf("%s: another server listens there", socket), c.Close())
		} else if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, err
		}
		if err := os.Remove(socket); err != nil {
			return nil, err
		}
	}
	return net.Listen("unix", socket)
}
