//go:build !linux

package image

const openNonblock = 0
