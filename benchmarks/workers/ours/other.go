//go:build !linux

// Command ours is measured on Linux alone.
package main

import "log"

func main() { log.Fatal("Linux only") }
