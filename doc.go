// Package overlay2 keeps filesystem layers on disk and joins them into one mounted tree
// with Linux overlayfs: the job of Docker's overlay2 storage driver, as a library.
//
// # The story of a layer
//
// A layer is a directory of the home, named by its ID. [Driver.Create] makes it, empty, on
// top of a parent; [Driver.ApplyDiff] fills it from a tar. A layer that has a child is committed:
// from then on it is read-only. [Driver.CreateReadWrite] makes the layer of a container;
// [Driver.Get] mounts it over all its ancestors and returns where, [Driver.Put] unmounts it.
// What was written there [Driver.Changes] lists, [Driver.Diff] packs into a tar, and
// [Driver.DiffSize] sums up. [Driver.Remove] removes it.
//
//	Create("base", "")        ApplyDiff("base", "", tar)
//	Create("app", "base")     ApplyDiff("app", "base", tar)
//	CreateReadWrite("box", "app")
//	Get("box") -> path        ... write below path ...        Put("box")
//	Diff("box", "app") -> tar
//	Remove("box"), Remove("app"), Remove("base")
//
// # On disk
//
// The format is Docker's: a home that dockerd wrote opens here and the other way round.
//
//	<home>/l/<link> -> ../<id>/diff     the short name of a layer
//	<home>/<id>/diff                    the layer's own files; whiteouts as overlayfs keeps them
//	<home>/<id>/link                    the layer's short name
//	<home>/<id>/lower                   the short names of its ancestors, "l/A:l/B", nearest first
//	<home>/<id>/work                    the kernel's work directory, for a layer with a parent
//	<home>/<id>/merged                  the mount point, while the layer is mounted
//	<home>/<id>/committed               empty; the layer has had a child
//	<home>/<id>/incomplete              while a diff is applied, and after that failed or was lost
//	<home>/staging                      layers being made and layers being deleted
//
// A layer appears and disappears by one rename between the home and staging. What a crash leaves
// lies in staging, and the next [New] deletes it. docs/format.md has the details and all that
// [Driver.Check] tests.
//
// # Crashes
//
// When the process is killed nothing that had returned is lost. What a power cut may cost
// depends on [Options].Durability: see docs/durability.md and [Driver.Sync].
//
// # Locks
//
// Each layer has a lock, held for the length of a call on it; a call on a child holds its
// parent's too, shared. Locks of layers are taken in the order of their IDs. Streams of Diff
// hold no lock, but keep their layer from being removed. So calls on different layers run at
// the same time, and calls on one layer one after the other.
//
// # Errors
//
// Every error of a call on a layer is a [LayerError], "op id: cause". The cause is one of the
// sentinels or an errno, for errors.Is; within an archive it is an archive.EntryError that names the
// entry. No error is dropped: what cannot be returned, such as that of a deletion in the
// background, is logged through [Options].Log, and nothing else is.
package overlay2
