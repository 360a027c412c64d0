package blockdev

import (
	"net"
	"os"
	"syscall"
	"time"
)

// links are fresh connections: what the server has and what is for the kernel, in the same order.
type links struct {
	server []*net.UnixConn
	kernel []syscall.Conn

	kernelEnds []*os.File // the same as kernel
}

func (l *links) add(server *net.UnixConn, kernel *os.File) {
	l.server = append(l.server, server)
	l.kernel = append(l.kernel, kernel)
	l.kernelEnds = append(l.kernelEnds, kernel)
}

func (l *links) closeKernelEnds() {
	for _, c := range l.kernelEnds {
		c.Close()
	}
}

func (l *links) close() {
	l.closeKernelEnds()
	for _, c := range l.server {
		c.Close()
	}
}

// A link is the server's end of a connection, or the kernel's if another server has the other one.
type link struct {
	conn   net.Conn // the server's; nil: it is dead, and is to be replaced
	unread []byte   // what was received from it and not executed

	socket *os.File  // the kernel's; nil: it is dead, and is to be replaced
	since  time.Time // since when it is, if that is known
}

// open returns the connection, or one at its end in the place of a dead one.
func (l link) open() net.Conn {
	if l.conn != nil {
		return l.conn
	}
	dead, other := net.Pipe()
	other.Close()
	return dead
}
