// Package overlay2 keeps filesystem layers on disk and joins them with Linux overlayfs.
package overlay2
