//go:build !linux

// Command containerd measures a peer that runs on Linux alone.
package main

func main() { panic("linux only") }
