package blockdev

import (
	"context"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"

	"github.com/nbdctl/nbdctl/server"
)

// A source is where the connections of a device come from.
type source interface {
	// connect makes n connections, until ctx ends at the latest.
	connect(ctx context.Context, n int) (*sockets, error)
}

// sockets are fresh connections: what the kernel is to have of each, and who serves or watches it,
// in the same order.
type sockets struct {
	kernel []syscall.Conn
	conns  []transmitter
	given  func() // lets go of what only the kernel is to have; nil: there is nothing
}

// release is for when the kernel has what it is to have, or will not.
func (s *sockets) release() {
	if s.given != nil {
		s.given()
	}
}

// close ends them.
func (s *sockets) close() {
	s.release()
	for _, c := range s.conns {
		c.Close()
	}
}

// A served connection is one that is served here.
type served struct {
	*server.Conn
	nc    net.Conn
	entry *entry
	begun *atomic.Bool // Transmit was called, or Close before
	away  *atomic.Bool // another process goes on with it
}

// newServed returns what serves a connection.
func (d *Device) newServed(nc net.Conn, unread []byte) served {
	c := served{d.export.NewConn(nc, unread), nc, d.ledger.enter(), new(atomic.Bool), &d.conns.away}
	if c.entry != nil {
		c.SetLedger(c.entry.word())
	}
	return c
}

// Transmit serves it to its end.
func (c served) Transmit() error {
	c.begun.Store(true)
	defer c.entry.end() // Nothing is in flight.
	return c.Conn.Transmit()
}

// Close cuts it. The kernel sees that, whoever else has the socket, unless another process goes on
// with it.
func (c served) Close() error {
	shut := func() {}
	if nc, ok := c.nc.(*net.UnixConn); ok && !c.away.Load() {
		shut = shutLater(nc)
	}
	err := c.Conn.Close()
	shut() // The loop knows by now that it is not the kernel that ends the stream.
	if !c.begun.Load() {
		c.entry.end() // Transmit does nothing any more.
	}
	return err
}

// shutLater returns what shuts a socket down, also when its descriptor is closed. If there is no
// other descriptor to be had it is shut down at once.
func shutLater(nc *net.UnixConn) (shut func()) {
	socket, err := copyFile(nc)
	if err != nil {
		_ = nc.CloseWrite() // An error is that of a socket that is closed already.
		_ = nc.CloseRead()
		return func() {}
	}
	return func() {
		_ = resetSocket(socket)
		socket.Close()
	}
}

// Idle reports whether it has carried nothing. Of one that was dead when the device was adopted
// that is not known.
func (c served) Idle() bool {
	_, ok := c.nc.(*net.UnixConn)
	return ok && nothing(c.Stats())
}

// nothing reports whether a connection with these statistics has carried nothing.
func nothing(n server.Stats) bool {
	return n.InFlight == 0 && n.Read.Requests+n.Write.Requests+n.Flush.Requests+n.Trim.Requests+
		n.WriteZeroes.Requests+n.Unknown.Requests == 0
}

// ownSource makes connections of the export of a device, whose requests are served here.
type ownSource struct{ device *Device }

func (s ownSource) connect(_ context.Context, n int) (*sockets, error) {
	d := s.device
	l, err := openLinks(n, d.machine.sendBuffer(), d.log)
	if err != nil {
		return nil, fmt.Errorf("blockdev: connection to the kernel: %w", err)
	}
	// The kernel has references of its own in the end. A copy that stayed open here would keep the
	// other end from seeing that the kernel has let go of a connection.
	made := &sockets{kernel: l.kernel, given: l.closeKernelEnds}
	for _, c := range l.server {
		made.conns = append(made.conns, d.newServed(c, nil))
	}
	return made, nil
}
