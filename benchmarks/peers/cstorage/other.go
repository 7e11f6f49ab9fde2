//go:build !linux

// Command cstorage measures a peer that runs on Linux alone.
package main

func main() { panic("linux only") }
