package overlay2

import (
	"fmt"
	"slices"
	"time"
)

// Durability says what is safe when power is cut or the kernel stops. When only the
// process is killed nothing is ever lost, whatever the mode. docs/durability.md has the details.
type Durability uint8

const (
	// DurabilityBackground syncs in the background: no call waits for the disk. A layer is safe when it has
	// been synced, some seconds later. If power is cut before, one made by Create and filled by ApplyDiff is
	// absent or ErrIncomplete, never taken for whole; one made by CreateReadWrite is absent, or there with
	// what the filesystem kept of its files.
	DurabilityBackground Durability = iota
	// DurabilityStrict puts on the disk what it does before a call returns without an error.
	DurabilityStrict
	// DurabilityOff syncs nothing and keeps no record of what is not on disk, as Docker does. After a power cut
	// layers may be damaged without a sign: for homes that are thrown away then.
	DurabilityOff
)

// durabilityNames are the modes as options and Status name them.
var durabilityNames = []string{"background", "strict", "off"}

const (
	// applyDelay is how long a filled layer waits for others that are synced with it.
	applyDelay = 2 * time.Second
	// createDelay is how long a layer waits that was made and not filled.
	createDelay = 10 * time.Second
	// maxFilesSynced is the number of layers up to which their files are synced one by one, rather
	// than the whole filesystem with all that others have written there.
	maxFilesSynced = 64
)

// String returns the mode's name, as Status shows it.
func (m Durability) String() string {
	if int(m) < len(durabilityNames) {
		return durabilityNames[m]
	}
	return fmt.Sprintf("Durability(%d)", uint8(m))
}

// parseDurability reads a mode's name.
func parseDurability(s string) (Durability, error) {
	i := slices.Index(durabilityNames, s)
	if i < 0 {
		return 0, fmt.Errorf("%q: not one of %q", s, durabilityNames)
	}
	return Durability(i), nil
}
