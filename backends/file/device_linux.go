package file

import (
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
)

// accessMode tells whether an open file is for reading only, and whether it goes past
// the page cache. It refuses one that is of no use.
func accessMode(f *os.File) (readOnly, direct bool, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return false, false, fmt.Errorf("file: %s: %w", f.Name(), err)
	}
	var flags int
	closed := raw.Control(func(fd uintptr) {
		flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0)
	})
	switch {
	case closed != nil:
		return false, false, fmt.Errorf("file: %s: %w", f.Name(), fs.ErrClosed)
	case err != nil:
		return false, false, fmt.Errorf("file: %s: %w", f.Name(), err)
	case flags&unix.O_APPEND != 0: // Linux would append, whatever the offset
		return false, false, fmt.Errorf("file: %s: open for appending: %w", f.Name(), fs.ErrInvalid)
	case flags&unix.O_ACCMODE == unix.O_WRONLY:
		return false, false, fmt.Errorf("file: %s: open for writing only: %w", f.Name(), fs.ErrInvalid)
	}
	return flags&unix.O_ACCMODE == unix.O_RDONLY, flags&unix.O_DIRECT != 0, nil
}

// sectorSizes asks a block device.
func (f *File) sectorSizes() (sizes backends.BlockSizes, err error) {
	err = f.control(func(fd int) error {
		logical, err := unix.IoctlGetUint32(fd, unix.BLKSSZGET)
		if err != nil {
			return err
		}
		physical, err := unix.IoctlGetUint32(fd, unix.BLKPBSZGET)
		sizes = backends.BlockSizes{Minimum: int(logical), Preferred: int(max(physical, logical))}
		return err
	})
	return sizes, err
}
