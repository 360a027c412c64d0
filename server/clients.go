package server

import (
	"fmt"
	"net"
	"time"
)

// clients are those of a server: each has a place from when it is accepted until it has gone.
type clients struct {
	places chan struct{}         // as many values as places are taken
	talks  map[net.Conn]struct{} // in the handshake
	conns  map[*Conn]struct{}
}

// seats returns the places for clients.
func (s *Server) seats() chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clients.places == nil {
		limit := s.MaxConnections
		if limit <= 0 {
			limit = defaultMaxConnections
		}
		s.clients.places = make(chan struct{}, limit)
	}
	return s.clients.places
}

// enter gives a client a place, as soon as there is one, and notes that it is in the handshake.
func (s *Server) enter(nc net.Conn) error {
	seats := s.seats()
	timeout := time.NewTimer(s.handshakeTimeout())
	defer timeout.Stop()
	select {
	case seats <- struct{}{}:
	case <-s.ending():
		return ErrServerClosed
	case <-timeout.C:
		return fmt.Errorf("server: handshake: %d clients are being served, and none has gone in %v", cap(seats), s.handshakeTimeout())
	}
	if !s.meet(nc) {
		<-seats
		return ErrServerClosed
	}
	return nil
}

// meet notes a client that has a place and is in the handshake now.
func (s *Server) meet(nc net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	if s.clients.talks == nil {
		s.clients.talks = make(map[net.Conn]struct{})
		s.clients.conns = make(map[*Conn]struct{})
	}
	s.clients.talks[nc] = struct{}{}
	s.running.Add(1)
	return true
}

// promote notes that a client has chosen.
func (s *Server) promote(nc net.Conn, chosen *choice, unread []byte) (*Session, error) {
	c := chosen.export.newConn(nc, unread, s.budget(chosen.export))
	c.retired = func() { s.retire(c) }
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		s.part(nc)
		return nil, ErrServerClosed
	}
	delete(s.clients.talks, nc)
	s.clients.conns[c] = struct{}{}
	s.mu.Unlock()
	return &Session{Agreement: chosen.agreement, export: chosen.export, conn: c}, nil
}

// part notes that a client has gone that did not choose.
func (s *Server) part(nc net.Conn) {
	s.mu.Lock()
	delete(s.clients.talks, nc)
	s.mu.Unlock()
	s.leave()
}

// retire notes that a client has gone that had chosen.
func (s *Server) retire(c *Conn) {
	s.mu.Lock()
	delete(s.clients.conns, c)
	s.mu.Unlock()
	s.leave()
}

// leave gives a place back.
func (s *Server) leave() {
	<-s.seats()
	s.running.Done()
}
