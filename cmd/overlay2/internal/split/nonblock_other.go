//go:build !linux

package split

const nonblock = 0
