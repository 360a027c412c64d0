package server

import (
	"errors"
	"syscall"
	"time"
)

// Much can keep the loop waiting: the backend, the bounds on what is in flight, a Swap, and a
// process that is stopped does nothing at all. By the time it goes on, the client may have hung up
// and sent everything again over another connection, also what lies unread in this one. That must
// not be executed any more: newer data may have been written in between. Whether the client is
// there costs a system call to find out, so it is asked only about what changes bytes, and is so
// old that the client may have lost its patience. From then on it is asked each time, for it can
// lose it at any moment.

// patience is shorter than that of the Linux client, whose timeout is in whole seconds.
const patience = 500 * time.Millisecond

// errHungUp is the reason to stop when there is nobody any more to execute requests for.
var errHungUp = errors.New("the client hung up while its requests waited; those that were not begun were not executed")

// outdated reports whether the request that the loop is at has perhaps been sent again over another
// connection, which it can't where there is none.
func (l *loop) outdated() bool { return l.conn.left.Load() || l.export.several.Load() && l.outlived() }

// outlived reports whether the request that the loop is at is older than the client's patience, and
// that is gone.
func (l *loop) outlived() bool {
	if !l.conn.left.Load() && l.inbox.age.over(patience) {
		l.conn.leave()
	}
	return l.conn.left.Load()
}

// abandoned reports whether nobody waits for replies any more.
func (c *Conn) abandoned() bool { return c.closed.Load() || c.left.Load() }

// leave has what still waits for its turn given up, if the client has hung up. A client that has
// merely sent its last request gets all replies.
func (c *Conn) leave() {
	if c.hungUp() {
		c.lose(false)
		c.left.Store(true)
		c.cancel()
		c.export.locks.Wake()
		c.export.admission.wake()
	}
}

// hungUp reports whether the client has shut down both directions of a socket, or closed it. Of a
// TCP connection, which does not tell one from the other, it reports only that it was reset.
func (c *Conn) hungUp() bool {
	s, ok := c.socket.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return true
	}
	hung := false
	if err := raw.Control(func(fd uintptr) { hung = hungUp(fd) }); err != nil {
		return true // Closed on this side.
	}
	return hung
}
