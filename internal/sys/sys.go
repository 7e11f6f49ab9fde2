// Package sys is the one door to the kernel: calls beneath a directory handle, mount
// calls, facts about filesystems. Every call retries EINTR, makes descriptors
// close-on-exec, and returns the bare errno or an error that wraps it.
//
// Functions take raw descriptors rather than os.File: a file of a layer is open for
// microseconds, and registering each with the runtime's poller costs more than writing it.
package sys
