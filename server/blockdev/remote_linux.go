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

// takeSocket makes a descriptor of a connection, which is used up. It blocks, for the runtime polls
// what does not, and would be woken by each packet.
func takeSocket(nc net.Conn) (*os.File, error) {
	defer nc.Close()
	var fd int
	var failed error
	dup := func(socket uintptr) {
		if fd, failed = unix.FcntlInt(socket, unix.F_DUPFD_CLOEXEC, 0); failed == nil {
			failed = unix.SetNonblock(fd, false)
		}
	}
	var socket syscall.Conn
	switch nc := nc.(type) {
	case *net.TCPConn:
		socket = nc
	case *net.UnixConn:
		socket = nc
	default:
		return nil, fmt.Errorf("the kernel can't have a %T: %w", nc, errors.ErrUnsupported)
	}
	raw, err := socket.SyscallConn()
	if err == nil {
		err = raw.Control(dup)
	}
	if err = errors.Join(err, failed); err != nil {
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

// control calls f with the descriptor of a file.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = f(int(fd)) })
	return errors.Join(err, failed)
}
