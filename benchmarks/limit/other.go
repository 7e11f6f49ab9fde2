//go:build !linux

// Package limit is for Linux alone.
package limit
