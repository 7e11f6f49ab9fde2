//go:build linux

// Package snapshotter makes [overlay2.Driver] a snapshotter of containerd: an implementation of
// snapshots.Snapshotter, which cmd/overlay2-snapshotter serves on a socket as a proxy plugin.
//
// # What lies in the root
//
//	<root>/lock         held by the one process that works here; names it
//	<root>/format       "1": what this page says
//	<root>/metadata.db  the snapshots: containerd's own store (core/snapshots/storage)
//	<root>/layers       the home of a Driver; docs/format.md
//
// A snapshot that can hold files, which is any but a view of another, has the layer whose ID is the number that the store
// gave it. The layer of a snapshot without a parent is over the layer "empty", which holds nothing: so each can be put over
// another parent when it is committed. Mounts never show it where it makes no difference.
//
// # Crashes
//
// The store says what there is. A layer is made before its record is written, and removed after the record is gone. So what
// a killed process leaves are layers without a record, which the next New and Cleanup remove. Before a snapshot is recorded as
// committed its files are on the disk, unless durability is off: a power cut may take active snapshots only.
//
// # Locks
//
// A write transaction of the store is held while a layer is made or rebased, while one that does not fit its record is looked
// at again, and while layers without a record are looked for; never while files are read or synced.
package snapshotter
