//go:build !linux

// Command limit is measured on Linux alone.
package main

import "log"

func main() { log.Fatal("Linux only") }
