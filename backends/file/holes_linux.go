package file

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/backends"
)

// control runs a system call, again when a signal has interrupted it.
func (f *File) control(call func(fd int) error) error {
	var err error
	closed := f.raw.Control(func(fd uintptr) {
		for err = unix.EINTR; err == unix.EINTR; {
			err = call(int(fd))
		}
	})
	if closed != nil {
		return fs.ErrClosed
	}
	return err
}

func (f *File) punchHole(off, n int64) error {
	return f.control(func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

// zeroExtent makes zeros of space that stays allocated.
func (f *File) zeroExtent(off, n int64) error {
	return f.control(func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

// readAhead begins to read what the page cache does not have.
func (f *File) readAhead(off, n int64) error {
	return f.control(func(fd int) error { return unix.Fadvise(fd, off, n, unix.FADV_WILLNEED) })
}

// discardRange is for block devices.
func (f *File) discardRange(off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	return f.control(func(fd int) error {
		_, _, err := unix.Syscall(
			unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&r)),
		)
		if err != 0 {
			return err
		}
		return nil
	})
}

// canTrim asks for what cannot be done: the refusal tells whether something else
// could be.
func (f *File) canTrim() bool {
	if f.block {
		// No sector begins at byte 1; blk_ioctl_discard looks first at whether the
		// device discards at all.
		return errors.Is(f.discardRange(1, 1), unix.EINVAL)
	}
	// There is nothing behind the end of the file. vfs_fallocate refuses what no file can
	// contain before it asks the file system.
	end := f.size.Load() + f.tail.Load()
	if end > math.MaxInt64-2<<20 {
		return true
	}
	return !errors.Is(f.punchHole((end|(1<<20-1))+1, 4096), errors.ErrUnsupported)
}

// Extents implements backends.Extenter. Space that is allocated and was never
// written counts as a hole.
func (f *File) Extents(off, n int64, yield func(backends.Extent) bool) error {
	if err := f.check(off, n); err != nil {
		return err
	}
	for end := off + n; off < end; {
		// SEEK_DATA and SEEK_HOLE move the file's offset too, which nobody uses.
		data, err := f.f.Seek(off, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO): // holes up to the end
			data = end
		case errors.Is(err, unix.EINVAL): // no way to know
			yield(backends.Extent{Offset: off, Length: end - off})
			return nil
		case err != nil:
			return fmt.Errorf("file: %w", err)
		}
		e := backends.Extent{Offset: off, Length: min(data, end) - off, Hole: true, Zero: true}
		if data == off {
			hole, err := f.f.Seek(off, unix.SEEK_HOLE)
			if err != nil {
				return fmt.Errorf("file: %w", err)
			}
			e = backends.Extent{Offset: off, Length: min(hole, end) - off}
		}
		if e.Length <= 0 { // a hole was made between the two calls
			continue
		}
		if !yield(e) {
			return nil
		}
		off += e.Length
	}
	return nil
}
