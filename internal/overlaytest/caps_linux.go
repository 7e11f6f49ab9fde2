package overlaytest

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// WithoutCap runs f on a thread without the capability, one of unix.CAP_*. f must not end the test.
func WithoutCap(t testing.TB, capability uint, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		var data [2]unix.CapUserData
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		err := unix.Capget(&hdr, &data[0])
		if err == nil {
			data[capability/32].Effective &^= 1 << (capability % 32)
			err = unix.Capset(&hdr, &data[0])
		}
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
