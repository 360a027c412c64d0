package doctor

import (
	"io/fs"
	"syscall"

	"golang.org/x/sys/unix"
)

// ownerOf returns the user that a file belongs to.
func ownerOf(info fs.FileInfo) (uid int, known bool) {
	st, known := info.Sys().(*syscall.Stat_t)
	if !known {
		return 0, false
	}
	return int(st.Uid), true
}

// mayWrite returns why this process can't write to a file, be it that the file
// system is read-only.
func mayWrite(path string) error { return unix.Access(path, unix.W_OK) }
