package machine

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// DeviceNumber returns the number ("43:96") of the block device that a path leads to, and false for
// anything else.
func DeviceNumber(path string) (string, bool) { return deviceNumberAt(unix.AT_FDCWD, path) }

// DeviceNumberIn is DeviceNumber for a name in an open directory, which is quicker.
func DeviceNumberIn(dir *os.File, name string) (string, bool) {
	return deviceNumberAt(int(dir.Fd()), name)
}

// deviceNumberAt is deviceNumber for a path that begins at an open directory.
func deviceNumberAt(dir int, path string) (string, bool) {
	var st unix.Statx_t
	// The cached attributes do, and asking a dead file server for fresh ones would take for ever:
	// the path may be any descriptor of any process.
	err := unix.Statx(dir, path, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE, &st)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "", false
	}
	return fmt.Sprintf("%d:%d", st.Rdev_major, st.Rdev_minor), true
}
