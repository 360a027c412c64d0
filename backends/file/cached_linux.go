package file

import (
	"os"

	"golang.org/x/sys/unix"
)

// errNotCached says that a read would have to wait for the disk.
var errNotCached error = unix.EAGAIN

// readCached fills p from the page cache, or does nothing that anybody can notice.
func readCached(fd int, p []byte, off int64) error {
	n, err := readNoWait(fd, p, off)
	if err == nil && n < len(p) {
		err = errNotCached
	}
	return err
}

// cached reports whether all pages of a range are in the page cache. Kernels before
// 6.5 cannot tell.
func cached(fd int, off int64, n int) bool {
	pageSize := int64(os.Getpagesize())
	first, last := off/pageSize, (off+int64(n)-1)/pageSize
	pages := uint64(last - first + 1)
	whole := unix.CachestatRange{Off: uint64(first * pageSize), Len: pages * uint64(pageSize)}
	var have unix.Cachestat_t
	err := unix.Cachestat(uint(fd), &whole, &have, 0)
	return err == nil && have.Cache >= pages
}
