package split

import "golang.org/x/sys/unix"

// nonblock keeps the opening of a fifo in a layer from waiting for a writer.
const nonblock = unix.O_NONBLOCK
