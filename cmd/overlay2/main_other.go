//go:build !linux

// Command overlay2 works on Linux only.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "overlay2: overlayfs is Linux's")
	os.Exit(1)
}
