package split

import (
	"io/fs"
	"syscall"
)

// inodeOf returns what tells a file from all others of a layer.
func inodeOf(st fs.FileInfo) (inode [2]uint64, ok bool) {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if ok {
		inode = [2]uint64{uint64(sys.Dev), sys.Ino}
	}
	return inode, ok
}
