package overlaytest

import "golang.org/x/sys/unix"

// statCalls are the calls that look at a name.
func statCalls() []uint32 { return []uint32{unix.SYS_NEWFSTATAT} }
