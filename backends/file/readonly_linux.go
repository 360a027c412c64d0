package file

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// checkWritable refuses what the kernel opens for writing although each write, or those
// of a part, would fail: whoever writes to the device's page cache would learn of it too
// late, or never.
func (f *File) checkWritable(size int64) error {
	if f.block {
		// blkdev_open does not look at the flag; blkdev_write_iter does.
		err := f.control(func(fd int) error {
			readOnly, err := unix.IoctlGetInt(fd, unix.BLKROGET)
			if err == nil && readOnly != 0 {
				err = unix.EROFS
			}
			return err
		})
		if err == unix.EROFS {
			return &ReadOnlyError{Path: f.path, Reason: blockProtected, Err: err}
		}
	} else {
		if limit, ok := sizeLimit(); ok && size > limit {
			reason := fmt.Sprintf("this process may write the first %d bytes of a file only (ulimit -f), and it has %d",
				limit, size)
			return &ReadOnlyError{Path: f.path, Reason: reason, Err: unix.EFBIG}
		}
		if f.sealed() {
			return &ReadOnlyError{
				Path:   f.path,
				Reason: "its memory is sealed against writes (F_SEAL_WRITE)",
				Err:    unix.EPERM,
			}
		}
	}
	// A write of nothing changes nothing, and is refused as one of something would be:
	// generic_write_checks, and what file systems ask before it, look at the length last.
	err := f.control(func(fd int) error {
		_, err := unix.Pwrite(fd, nil, 0)
		return err
	})
	switch {
	case err == unix.ETXTBSY: // IS_SWAPFILE
		return &LockedError{Path: f.path, Swap: true}
	case writeProtected(err):
		return &ReadOnlyError{Path: f.path, Reason: whyProtected(f.f, f.block, err), Err: err}
	}
	return nil // What else may be wrong is for the requests to find.
}

// sealed reports whether the file is a memfd that must not be written any more.
func (f *File) sealed() bool {
	var seals int
	err := f.control(func(fd int) (err error) {
		seals, err = unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
		return err
	})
	return err == nil && seals&(unix.F_SEAL_WRITE|unix.F_SEAL_FUTURE_WRITE) != 0
}

const blockProtected = "the block device is read-only"

// whyProtected explains an error for which writeProtected holds.
func whyProtected(f *os.File, block bool, err error) string {
	var st unix.Statx_t
	if raw, rawErr := f.SyscallConn(); rawErr == nil {
		_ = raw.Control(func(fd uintptr) { // Of a file without attributes that can be told, none is told.
			_ = unix.Statx(int(fd), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st)
		})
	}
	readOnly := errors.Is(err, unix.EROFS)
	switch {
	case block && readOnly:
		return blockProtected
	case readOnly:
		return "its file system is read-only"
	case st.Attributes&unix.STATX_ATTR_IMMUTABLE != 0:
		return "it is immutable (chattr +i)"
	case st.Attributes&unix.STATX_ATTR_APPEND != 0:
		return "it is append-only (chattr +a)"
	case st.Attributes&unix.STATX_ATTR_VERITY != 0:
		return "it is protected by fs-verity"
	case errors.Is(err, unix.EPERM):
		return unix.EPERM.Error()
	}
	return unix.EACCES.Error()
}

// sizeLimit returns how long a regular file may become by what this process writes, in
// bytes, if there is a limit: generic_write_check_limits refuses also to write what is
// there already, beyond it.
func sizeLimit() (int64, bool) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &limit); err != nil || limit.Cur > 1<<63-1 {
		return 0, false
	}
	return int64(limit.Cur), true
}
