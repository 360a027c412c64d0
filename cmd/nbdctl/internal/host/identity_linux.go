package host

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// IdentityOf tells an open file, or the block device behind it, from all others of this machine; ""
// if that can't be told.
func IdentityOf(f *os.File) string {
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	st := info.Sys().(*syscall.Stat_t)
	if st.Mode&syscall.S_IFMT == syscall.S_IFBLK {
		return "block device " + deviceNumber(st.Rdev)
	}
	return fmt.Sprintf("inode %d of device %s", st.Ino, deviceNumber(st.Dev))
}

func deviceNumber(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }
