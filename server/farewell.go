package server

import (
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"time"
)

// farewellTimeout is how long a client over TLS has to take what was sent to it, and to hang up,
// when the server ends the connection.
const farewellTimeout = 5 * time.Second

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
	if err == ErrShutdown {
		s.farewell(session.conn)
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
	over, ok := c.nc.(*tls.Conn)
	if !ok {
		return
	}
	half, ok := c.socket.(interface{ CloseWrite() error })
	if !ok || !s.beginFarewell(c.socket) {
		return
	}
	defer s.endFarewell(c.socket)
	_ = over.CloseWrite() // Errors show when it is read.
	_ = half.CloseWrite()
	if err := c.socket.SetReadDeadline(time.Now().Add(farewellTimeout)); err != nil {
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
