package image

import "golang.org/x/sys/unix"

// openNonblock keeps the opening of a fifo in a layout from waiting for a writer.
const openNonblock = unix.O_NONBLOCK
