package server

import (
	"errors"
	"io/fs"
	"syscall"
)

// errno is an error number of the NBD protocol ("Error values"). The numbers are those of Linux on every system that
// serves: the values of package syscall differ from one system to the next and must never reach the wire.
type errno uint32

const (
	errnoNone     errno = 0
	errnoPerm     errno = 1   // NBD_EPERM
	errnoIO       errno = 5   // NBD_EIO
	errnoNoMem    errno = 12  // NBD_ENOMEM
	errnoInvalid  errno = 22  // NBD_EINVAL
	errnoNoSpace  errno = 28  // NBD_ENOSPC
	errnoOverflow errno = 75  // NBD_EOVERFLOW
	errnoNotSup   errno = 95  // NBD_ENOTSUP
	errnoShutdown errno = 108 // NBD_ESHUTDOWN
)

// wireErrno returns the number that tells a client of err. What the protocol has no number for is an I/O error.
func wireErrno(err error) errno {
	if err == nil {
		return errnoNone
	}
	var sys syscall.Errno
	if errors.As(err, &sys) {
		switch sys {
		case syscall.ENOMEM:
			return errnoNoMem
		case syscall.EINVAL:
			return errnoInvalid
		case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
			return errnoNoSpace
		case syscall.EOVERFLOW:
			return errnoOverflow
		case syscall.ESHUTDOWN:
			return errnoShutdown
		case syscall.EROFS:
			return errnoPerm
		}
	}
	switch {
	case errors.Is(err, fs.ErrPermission): // EPERM and EACCES among them
		return errnoPerm
	case errors.Is(err, errors.ErrUnsupported): // ENOTSUP, EOPNOTSUPP and ENOSYS among them
		return errnoNotSup
	default:
		return errnoIO
	}
}
