package rawio

import (
	"errors"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reset ends the connection of a socket at once, whoever else has it: what it has not sent it will
// not send, and a TCP peer to which something was due is told that it was reset. Of other sockets
// what was sent is sent.
func Reset(fd int) error {
	// The call that is refused shuts down nothing: a socket that is not connected any more.
	err := unix.Shutdown(fd, unix.SHUT_RDWR)
	if errors.Is(err, unix.ENOTCONN) {
		err = nil
	}
	kind, failed := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if failed != nil || kind != unix.IPPROTO_TCP {
		return errors.Join(err, failed)
	}
	// Kernels around 6.4 refuse to disconnect a socket while somebody still waits in it (EBUSY).
	// Such a one is reset when the last who has it closes it.
	err = errors.Join(err, unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
	// To connect to no address is to disconnect (connect(2)), which tcp_disconnect does by a reset.
	none := syscall.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, e := syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&none)), unsafe.Sizeof(none))
	if e != 0 {
		return errors.Join(err, e)
	}
	return err
}
