package file

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// careful is, in bytes, an alignment that suits all disks and, for memory, all
// kernels.
const careful = 4096

// findDirect finds out how the file wants to be read and written past the page cache.
// It changes nothing.
func (f *File) findDirect() (*direct, error) {
	var fs unix.Statfs_t
	if err := f.control(func(fd int) error { return unix.Fstatfs(fd, &fs) }); err != nil {
		return nil, fmt.Errorf("file: %s: statfs: %w", f.path, err)
	}
	// Its 32 bits are a negative number where the type has no more (RAMFS_MAGIC).
	if kind := uint32(fs.Type); !f.block && (kind == unix.TMPFS_MAGIC || kind == unix.RAMFS_MAGIC) {
		// Since Linux 6.6 tmpfs takes O_DIRECT, and goes on as before.
		return nil, &DirectError{Path: f.path, Reason: "its file system keeps it in the page cache and nowhere else"}
	}
	var st unix.Statx_t
	err := f.control(func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_DIOALIGN, &st)
	})
	switch {
	case err != nil: // older than 4.11, or forbidden in a container
		return newDirect(max(careful, int64(f.sizes.Minimum)), careful), nil
	case st.Mask&unix.STATX_DIOALIGN == 0: // older than 6.1, or a file system that does not tell
		return newDirect(f.sectorBelow(&st), careful), nil
	case st.Dio_offset_align == 0:
		return nil, &DirectError{Path: f.path, Reason: "its file system cannot do it for this file"}
	}
	return newDirect(int64(st.Dio_offset_align), uintptr(max(st.Dio_mem_align, 1))), nil
}

// sectorBelow returns the size in bytes of the sectors on which the file lies, or
// that no sector is larger than.
func (f *File) sectorBelow(st *unix.Statx_t) int64 {
	if f.block {
		return int64(f.sizes.Minimum)
	}
	disk := fmt.Sprintf("/sys/dev/block/%d:%d/", st.Dev_major, st.Dev_minor)
	for _, queue := range []string{disk + "queue/", disk + "../queue/"} { // a partition has its disk's
		b, err := os.ReadFile(queue + "logical_block_size")
		if err != nil {
			continue
		}
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && n > 0 && n&(n-1) == 0 {
			return int64(n)
		}
	}
	return careful
}

// goDirect makes reads and writes of the file go past the page cache from now on, or
// leaves it as it was.
func (f *File) goDirect() error {
	err := f.setDirect(true)
	if err == nil {
		_, err = f.direct.read(make([]byte, f.direct.unit), 0, f.f.ReadAt)
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
			return nil // What else may be wrong with the first block is not the question.
		}
		err = errors.Join(err, f.setDirect(false))
	}
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, errors.ErrUnsupported):
		return &DirectError{Path: f.path, Reason: "its file system does not offer it"}
	}
	return fmt.Errorf("file: %s: O_DIRECT: %w", f.path, err)
}

func (f *File) setDirect(on bool) error {
	return f.control(func(fd int) error {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			return err
		}
		flags &^= unix.O_DIRECT
		if on {
			flags |= unix.O_DIRECT
		}
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags)
		return err
	})
}
