package server

import (
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"time"
)

const (
	// farewellTimeout is how long a client over TLS has to take what was sent to it, and to hang
	// up, when the server ends the connection.
	farewellTimeout = 5 * time.Second
	// partingTimeout is how long a client over vsock has to hang up that has said it would.
	partingTimeout = time.Second
)

// ServeSession serves a session of the server until its client goes, as Serve does with those that
// it has accepted, closes the connection, and returns what Conn.Transmit has. Logger takes a record
// of it, and Shutdown waits for it. To be called once, in place of Transmit.
func (s *Server) ServeSession(session *Session) error {
	s.mu.Lock()
	if !s.closed {
		s.running.Add(1)
		defer s.running.Done()
	}
	s.mu.Unlock()
	return s.transmit(session)
}

// transmit is ServeSession for who is among those that Shutdown waits for.
func (s *Server) transmit(session *Session) error {
	client := nameOf(session.conn.socket)
	begun := clock()
	err := session.conn.Transmit()
	took := clock() - begun
	switch {
	case err == ErrShutdown:
		s.farewell(session.conn)
	case err == nil && session.conn.socket.RemoteAddr().Network() == "vsock":
		s.letHangUp(session.conn)
	}
	session.NetConn().Close() // Over TLS, the client is told that this is the end.
	sort := eventEnded
	if failed(err) {
		sort = eventClient
	}
	s.note(sort, func() slog.Record { return connectionRecord(session, client, took, err) })
	return err
}

// farewell has a client over TLS, from which the server reads no more requests, get all replies and
// the end of the stream. To close a TCP socket in which something is unread would reset it, and
// drop what was not sent yet.
func (s *Server) farewell(c *Conn) {
	if over, ok := c.nc.(*tls.Conn); ok {
		s.awaitEnd(c, over, farewellTimeout)
	}
}

// letHangUp has a client over vsock hang up first. If it has ended its side of the connection just
// before it is told of the end of the other one, a kernel may have it receive ENOTCONN in place of
// the end: vsock_shutdown takes away the flag by which vsock_connectible_recvmsg knows that the
// connection has ended in order (net/vmw_vsock/af_vsock.c).
func (s *Server) letHangUp(c *Conn) { s.awaitEnd(c, nil, partingTimeout) }

// awaitEnd ends the server's side of a connection, and waits for the end of the other one.
func (s *Server) awaitEnd(c *Conn, over *tls.Conn, timeout time.Duration) {
	half, ok := c.socket.(interface{ CloseWrite() error })
	if !ok || !s.beginFarewell(c.socket) {
		return
	}
	defer s.endFarewell(c.socket)
	if over != nil {
		_ = over.CloseWrite() // Errors show when it is read.
	}
	_ = half.CloseWrite()
	if err := c.socket.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, c.socket)
}

// beginFarewell notes a socket that Close is to close. It reports whether that is still to come.
func (s *Server) beginFarewell(nc net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cut {
		return false
	}
	if s.clients.parting == nil {
		s.clients.parting = make(map[net.Conn]struct{})
	}
	s.clients.parting[nc] = struct{}{}
	return true
}

func (s *Server) endFarewell(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.clients.parting, nc)
}
