package nbdnl

import (
	"os"
	"syscall"
)

// inode returns the number of a file, 0 when it has none.
func inode(info os.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return 0
}
