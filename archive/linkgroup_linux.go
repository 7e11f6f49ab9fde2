package archive

import (
	"slices"
	"strings"

	"github.com/bcc2decd/overlay2/internal/sys"
	"golang.org/x/sys/unix"
)

// linkGroups finds files that are as before but hard links of files that are not: a diff must hold
// them too, as otherwise they would stay the old file and the group be torn. Files with one link only
// are not held.
type linkGroups map[inode]*linkGroup

// linkGroup is one file of the new tree that has several names.
type linkGroup struct {
	same    []string // the names under which it is as before
	changed bool     // another name is added, or was something else
}

// note records a name of a file of the new tree, if it is one of several.
func (g *linkGroups) note(st *sys.Stat, path string, changed bool) {
	if st.Nlink < 2 || st.Type() == unix.S_IFDIR {
		return
	}
	if *g == nil {
		*g = make(linkGroups)
	}
	id := inode{st.Dev, st.Ino}
	group := (*g)[id]
	if group == nil {
		group = &linkGroup{}
		(*g)[id] = group
	}
	group.changed = group.changed || changed
	if !changed {
		group.same = append(group.same, path)
	}
}

// torn returns the names that are to be Modified though they are as before.
func (g linkGroups) torn() []string {
	var paths []string
	for _, group := range g {
		if group.changed {
			paths = append(paths, group.same...)
		}
	}
	return paths
}

// withTorn adds the names of torn groups, and the directories above them, to changes.
func withTorn(changes []Change, paths []string) []Change {
	if len(paths) == 0 {
		return changes
	}
	listed := make(map[string]bool, len(changes))
	for _, c := range changes {
		listed[c.Path] = true
	}
	changes = slices.Clip(changes)
	for _, path := range paths {
		for ; path != "" && !listed[path]; path = path[:strings.LastIndexByte(path, '/')] {
			listed[path] = true
			changes = append(changes, Change{Path: path, Kind: Modified})
		}
	}
	return changes
}
