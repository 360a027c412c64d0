//go:build !linux

package rawio

import (
	"errors"
	"syscall"
)

// WatchHangup is not to be had.
func WatchHangup(s syscall.Conn, gone func()) (stop func(), err error) {
	return nil, errors.ErrUnsupported
}
