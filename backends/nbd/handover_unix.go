//go:build unix && !aix

package nbd

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// duplicate returns another descriptor of the socket of a connection. It stays one that does not
// block, which File.Fd would change with that of package net, for all of its copies.
func duplicate(nc net.Conn) (*os.File, error) {
	conn, ok := nc.(syscall.Conn)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	closed := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(closed, err); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "nbd connection"), nil
}
