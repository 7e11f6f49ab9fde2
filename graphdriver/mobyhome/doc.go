// Package mobyhome tests that moby's own overlay2 driver and this library read each other's homes with quotas
// right. It is a module of its own, as moby's driver needs more than the interface that package
// graphdriver serves, and cgo. `make test-vm-quota` runs it where there are quotas.
package mobyhome
