package blockdev

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// openLinks makes n connections. The kernel's ends get a send buffer of that many bytes, if they
// may.
func openLinks(n, sendBuffer int, log *slog.Logger) (*links, error) {
	l := new(links)
	for range n {
		// Nobody else must hold a copy: the kernel notices that its server has died only when all
		// copies are closed. What blocks the runtime does not poll: of the kernel's end it never
		// needs to, of the server's FileConn makes one that it does.
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			l.close()
			return nil, fmt.Errorf("socketpair: %w", err)
		}
		// Needs CAP_NET_ADMIN. A smaller one is slower, and a big one not to have is a risk
		// (breaksSends), but no failure.
		err = unix.SetsockoptInt(fds[1], unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer)
		if err != nil && sendBuffer >= bigSendBuffer {
			log.Warn("send buffer of the kernel's connection was not enlarged", "bytes", sendBuffer, "err", err)
		}
		kernel := os.NewFile(uintptr(fds[1]), "kernel's end")
		server, err := unixConn(fds[0])
		if err != nil {
			kernel.Close()
			l.close()
			return nil, err
		}
		l.add(server, kernel)
	}
	return l, nil
}

// unixConn makes a connection of a descriptor, which is used up.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "nbd")
	c, err := net.FileConn(f) // with a descriptor of its own
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}
