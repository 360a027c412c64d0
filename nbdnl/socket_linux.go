package nbdnl

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// dupSockets returns descriptors of its own for the sockets. With them the kernel can be asked
// without holding on to the callers' connections, whose Close would otherwise wait for a stuck
// kernel.
func dupSockets(conns []syscall.Conn) (fds []int, err error) {
	defer func() {
		if err != nil {
			closeAll(fds)
		}
	}()
	for i, conn := range conns {
		raw, err := conn.SyscallConn()
		if err != nil {
			return fds, fmt.Errorf("socket %d: %w", i, err)
		}
		var fd int
		var dupErr error
		err = raw.Control(func(orig uintptr) {
			fd, dupErr = unix.FcntlInt(orig, unix.F_DUPFD_CLOEXEC, 0)
		})
		if err := errors.Join(err, dupErr); err != nil {
			return fds, fmt.Errorf("socket %d: %w", i, err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// clearSendLimits removes the time limit of each socket's sends, and returns what they were.
func clearSendLimits(fds []int) ([]unix.Timeval, error) {
	limits := make([]unix.Timeval, len(fds))
	for i, fd := range fds {
		tv, err := unix.GetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO)
		if err == nil {
			err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{})
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("socket %d: %w", i, err), restoreSendLimits(fds[:i], limits, nil))
		}
		limits[i] = *tv
	}
	return limits, nil
}

// sendLimited returns which of the sockets have a time limit on sends.
func sendLimited(fds []int) ([]bool, error) {
	limited := make([]bool, len(fds))
	for i, fd := range fds {
		tv, err := unix.GetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO)
		if err != nil {
			return nil, fmt.Errorf("socket %d: %w", i, err)
		}
		limited[i] = *tv != unix.Timeval{}
	}
	return limited, nil
}

// restoreSendLimits undoes clearSendLimits, but for the sockets that are to be left alone.
func restoreSendLimits(fds []int, limits []unix.Timeval, except []bool) error {
	var errs []error
	for i, fd := range fds {
		if i >= len(except) || !except[i] {
			errs = append(errs, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limits[i]))
		}
	}
	return errors.Join(errs...)
}

// dupDescriptors returns copies of descriptors.
func dupDescriptors(fds []int) ([]int, error) {
	copies := make([]int, 0, len(fds))
	for i, fd := range fds {
		c, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			closeAll(copies)
			return nil, fmt.Errorf("socket %d: %w", i, err)
		}
		copies = append(copies, c)
	}
	return copies, nil
}

// shutDownAll ends the connections of sockets, for whoever else has them too.
func shutDownAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // it may be so already, or be no socket
	}
}

// hungUp reports whether the other ends of all the sockets are closed or shut down, or these are.
// One direction is enough, for the kernel then gives the connection up; a server asks for both.
func hungUp(fds []int) bool {
	polled := make([]unix.PollFd, len(fds))
	for i, fd := range fds {
		polled[i] = unix.PollFd{Fd: int32(fd), Events: unix.POLLRDHUP}
	}
	n, err := unix.Poll(polled, 0)
	return err == nil && n == len(fds)
}

// isShutDown reports whether a socket has been shut down, or its other end. Of one that is closed
// it can't tell.
func isShutDown(conn syscall.Conn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	shut := false
	_ = raw.Control(func(fd uintptr) { shut = hungUp([]int{int(fd)}) })
	return shut
}

// closeAll closes descriptors that were made here. The sockets themselves live on in the kernel.
func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd) // fails for no socket that is open
	}
}
