//go:build !linux

package split

import "io/fs"

func inodeOf(fs.FileInfo) (inode [2]uint64, ok bool) { return inode, false }
