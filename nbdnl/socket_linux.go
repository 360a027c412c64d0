package nbdnl

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// dupSockets returns descriptors of its own for the sockets. With them the kernel can be asked without
// holding on to the callers' connections, whose Close would otherwise wait for a stuck kernel.
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

// closeAll closes descriptors that dupSockets made. The sockets themselves live on in the kernel.
func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd) // fails for no socket that is open
	}
}
