package blockdev

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/server/internal/rawio"
)

// takeSocket makes a descriptor of a connection, which is used up.
func takeSocket(nc net.Conn) (*os.File, error) {
	defer nc.Close()
	var socket syscall.Conn
	switch nc := nc.(type) {
	case *net.TCPConn:
		socket = nc
	case *net.UnixConn:
		socket = nc
	default:
		return nil, fmt.Errorf("the kernel can't have a %T: %w", nc, errors.ErrUnsupported)
	}
	return copySocket(socket)
}

// copySocket returns another descriptor of a socket. It blocks, for the runtime polls what does
// not, and would be woken by each packet. All descriptors of the socket block then.
func copySocket(socket syscall.Conn) (*os.File, error) {
	fd := -1
	err := control(socket, func(socket int) error {
		if _, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
			return err // It is something else.
		}
		var err error
		fd, err = unix.FcntlInt(uintptr(socket), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "kernel's connection"), nil
}

// enlargeSendBuffer gives a socket of the kernel's a send buffer of so many bytes, if it may.
func enlargeSendBuffer(socket *os.File, bytes int, log *slog.Logger) {
	_ = control(socket, func(fd int) error {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, bytes)
		if err != nil {
			log.Warn("send buffer of the kernel's connection was not enlarged", "bytes", bytes, "err", err)
		}
		return nil
	})
}

// socketError returns what has ended a connection, if the socket still has it.
func socketError(socket *os.File) error {
	return control(socket, func(fd int) error {
		e, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && e != 0 {
			err = unix.Errno(e)
		}
		return err
	})
}

// resetSocket ends the connection of a socket for the kernel and the peer, too.
func resetSocket(socket *os.File) error { return control(socket, rawio.Reset) }

// control calls f with the descriptor of a socket.
func control(socket syscall.Conn, f func(fd int) error) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = f(int(fd)) })
	return errors.Join(err, failed)
}
