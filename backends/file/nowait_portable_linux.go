//go:build (!amd64 && !arm64) || race

package file

import "golang.org/x/sys/unix"

// readNoWait is preadv2 with RWF_NOWAIT. The race detector sees what it writes.
func readNoWait(fd int, p []byte, off int64) (int, error) {
	return unix.Preadv2(fd, [][]byte{p}, off, unix.RWF_NOWAIT)
}
