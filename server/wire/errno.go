package wire

import (
	"errors"
	"io/fs"
	"syscall"
)

// An Errno is an error number of the NBD protocol ("Error values"). The numbers are those of Linux
// on every system: the values of package syscall differ from one system to the next and must never
// reach the wire.
type Errno uint32

// The error numbers.
const (
	ErrnoNone     Errno = 0   // no error
	ErrnoPerm     Errno = 1   // NBD_EPERM
	ErrnoIO       Errno = 5   // NBD_EIO
	ErrnoNoMem    Errno = 12  // NBD_ENOMEM
	ErrnoInvalid  Errno = 22  // NBD_EINVAL
	ErrnoNoSpace  Errno = 28  // NBD_ENOSPC
	ErrnoOverflow Errno = 75  // NBD_EOVERFLOW
	ErrnoNotSup   Errno = 95  // NBD_ENOTSUP
	ErrnoShutdown Errno = 108 // NBD_ESHUTDOWN
)

// ErrnoOf returns the number that tells a client of err. What the protocol has no number for is an
// I/O error.
func ErrnoOf(err error) Errno {
	if err == nil {
		return ErrnoNone
	}
	var sys syscall.Errno
	if errors.As(err, &sys) {
		switch sys {
		case syscall.ENOMEM:
			return ErrnoNoMem
		case syscall.EINVAL:
			return ErrnoInvalid
		case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
			return ErrnoNoSpace
		case syscall.EOVERFLOW:
			return ErrnoOverflow
		case syscall.ESHUTDOWN:
			return ErrnoShutdown
		case syscall.EROFS:
			return ErrnoPerm
		}
	}
	switch {
	case errors.Is(err, fs.ErrPermission): // EPERM and EACCES among them
		return ErrnoPerm
	case errors.Is(err, errors.ErrUnsupported): // ENOTSUP, EOPNOTSUPP and ENOSYS among them
		return ErrnoNotSup
	default:
		return ErrnoIO
	}
}
