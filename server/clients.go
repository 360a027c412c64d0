package server

import (
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/admit"
)

// clients are those of a server: each has a place from when it is accepted until it has gone.
type clients struct {
	places chan struct{}         // as many values as places are taken
	talks  map[net.Conn]struct{} // in the handshake
	conns  map[*Conn]struct{}
	// memory is that for the clients of each export, as long as it has some.
	memory map[*Export]*sharedMemory
}

// A sharedMemory is the memory for the requests of the clients of an export.
type sharedMemory struct {
	*admit.Memory
	clients int
}

// seats returns the places for clients.
func (s *Server) seats() chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clients.places == nil {
		s.clients.places = make(chan struct{}, s.maxConnections())
	}
	return s.clients.places
}

func (s *Server) maxConnections() int {
	if s.MaxConnections > 0 {
		return s.MaxConnections
	}
	return defaultMaxConnections
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
		return fmt.Errorf("server: handshake: %d clients are being served, and none has gone in %v",
			cap(seats), s.handshakeTimeout())
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
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		s.part(nc)
		return nil, ErrServerClosed
	}
	c := chosen.export.newConn(chosen.over, unread, s.share(chosen.export), s.evict)
	c.agree(chosen.agreement)
	c.retired = func() { s.retire(c) }
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
	if m := s.clients.memory[c.export]; m.clients > 1 {
		m.clients--
	} else {
		delete(s.clients.memory, c.export)
	}
	s.mu.Unlock()
	s.leave()
}

// share returns the memory for the clients of an export, of which there is one more. The caller
// holds mu.
func (s *Server) share(e *Export) *admit.Memory {
	m := s.clients.memory[e]
	if m == nil {
		limit := s.MaxMemory
		if limit <= 0 {
			limit = defaultMaxMemory
		}
		m = &sharedMemory{Memory: admit.NewMemory(limit, s.maxConnections())}
		if s.clients.memory == nil {
			s.clients.memory = make(map[*Export]*sharedMemory)
		}
		s.clients.memory[e] = m
	}
	m.clients++
	return m.Memory
}

// evict disconnects a client that keeps memory from others.
func (s *Server) evict(c *Conn) {
	if c.closed.Load() {
		return
	}
	s.logger().Warn("client disconnected: others wait for memory that it holds, "+
		"and it does not take a reply or send its data",
		slog.String("client", c.nc.RemoteAddr().String()))
	c.Close()
}

// leave gives a place back.
func (s *Server) leave() {
	<-s.seats()
	s.running.Done()
}
