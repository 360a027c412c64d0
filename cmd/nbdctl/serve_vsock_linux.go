package main

import (
	"errors"
	"net"
	"os"
	"syscall"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// A vsockListener is one whose descriptor can be had.
type vsockListener struct {
	*vsock.Listener
	file *os.File
}

// File returns a copy of the descriptor.
func (l *vsockListener) File() (*os.File, error) { return duplicate(l.file) }

// Close closes both.
func (l *vsockListener) Close() error { return errors.Join(l.Listener.Close(), l.file.Close()) }

// listenVsockAt listens to a port of all of this machine's contexts.
func listenVsockAt(port uint32) (net.Listener, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "vsock")
	err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrVM{CID: anyContext, Port: port}))
	if err == nil {
		err = os.NewSyscallError("listen", unix.Listen(fd, unix.SOMAXCONN))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return vsockListenerOf(f)
}

// vsockListenerOf makes a listener of a descriptor, which belongs to it.
func vsockListenerOf(f *os.File) (net.Listener, error) {
	l, err := vsock.FileListener(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &vsockListener{l, f}, nil
}

// A vsockConn is a connection that another process has accepted.
type vsockConn struct {
	*os.File
	local, remote net.Addr
}

// LocalAddr and RemoteAddr return the two ends.
func (c vsockConn) LocalAddr() net.Addr  { return c.local }
func (c vsockConn) RemoteAddr() net.Addr { return c.remote }

// CloseWrite tells the other end that nothing comes any more.
func (c vsockConn) CloseWrite() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.Shutdown(int(fd), unix.SHUT_WR) })
	return errors.Join(err, failed)
}

// Copy returns a copy of the descriptor.
func (c vsockConn) Copy() (*os.File, error) { return duplicate(c.File) }

// vsockConnOf makes a connection of a descriptor, which belongs to it.
func vsockConnOf(f *os.File) (net.Conn, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	var local, remote unix.Sockaddr
	var err1, err2 error
	err = raw.Control(func(fd uintptr) { // It does not block, and the runtime polls it.
		local, err1 = unix.Getsockname(int(fd))
		remote, err2 = unix.Getpeername(int(fd))
	})
	if err := errors.Join(err, err1, err2); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return vsockConn{f, vsockAddr(local), vsockAddr(remote)}, nil
}

func vsockAddr(a unix.Sockaddr) net.Addr {
	vm, ok := a.(*unix.SockaddrVM)
	if !ok {
		return new(vsock.Addr)
	}
	return &vsock.Addr{ContextID: vm.CID, Port: vm.Port}
}

// duplicate returns another descriptor of a socket.
func duplicate(s syscall.Conn) (copied *os.File, err error) {
	raw, err := s.SyscallConn()
	if err != nil {
		return nil, err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		var n int
		if n, failed = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); failed == nil {
			copied = os.NewFile(uintptr(n), "vsock")
		}
	})
	return copied, errors.Join(err, failed)
}
