package server

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/admit"
)

// clients are those of a server: each has a place from when it is accepted until it has gone.
type clients struct {
	places chan struct{}         // as many values as places are taken
	talks  map[net.Conn]struct{} // in the handshake
	conns  map[*Conn]*Session
	from   map[netip.Prefix]int // how many of them an address has
	// parting are the sockets of clients over TLS that are told the end.
	parting map[net.Conn]struct{}
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
	err := s.meet(nc, nil)
	if err != nil {
		<-seats
	}
	return err
}

// meet notes a client that has a place and is in the handshake now. While the server is held it
// waits, but for a client that was accepted by a before the server stood still.
func (s *Server) meet(nc net.Conn, a *acceptor) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.held != nil && (a == nil || s.held.settled) {
		s.waitHeld()
	}
	if a != nil {
		a.waiting = nil
	}
	if s.closed {
		return ErrServerClosed
	}
	if a := addressOf(nc); a.IsValid() {
		if s.clients.from[a] >= s.maxPerAddress() {
			return fmt.Errorf("server: handshake: %d clients of %v are being served", s.maxPerAddress(), a)
		}
		if s.clients.from == nil {
			s.clients.from = make(map[netip.Prefix]int)
		}
		s.clients.from[a]++
	}
	if s.clients.talks == nil {
		s.clients.talks = make(map[net.Conn]struct{})
		s.clients.conns = make(map[*Conn]*Session)
	}
	s.clients.talks[nc] = struct{}{}
	s.running.Add(1)
	return nil
}

func (s *Server) maxPerAddress() int {
	if s.MaxPerAddress > 0 {
		return s.MaxPerAddress
	}
	return max(1, s.maxConnections()/4)
}

// addressOf returns what the clients of an address have in common, or nothing where they are not
// counted.
func addressOf(nc net.Conn) netip.Prefix {
	a, ok := nc.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := a.AddrPort().Addr().Unmap()
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	p, _ := ip.WithZone("").Prefix(bits) // It fails for no address.
	return p
}

// promote notes that a client has chosen.
func (s *Server) promote(nc net.Conn, chosen *choice, unread []byte) (*Session, error) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		chosen.export.done()
		s.part(nc)
		return nil, ErrServerClosed
	}
	e := chosen.export.Export
	c := e.newConn(chosen.over, unread, s.share(e), s.evict)
	c.agree(chosen.agreement)
	c.retired = func() {
		chosen.export.done()
		s.retire(c)
	}
	session := &Session{Agreement: chosen.agreement, export: e, conn: c}
	delete(s.clients.talks, nc)
	s.clients.conns[c] = session
	s.settle()
	s.mu.Unlock()
	return session, nil
}

// part notes that a client has gone that did not choose.
func (s *Server) part(nc net.Conn) {
	s.mu.Lock()
	delete(s.clients.talks, nc)
	s.settle()
	s.mu.Unlock()
	s.leave(nc)
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
	s.leave(c.socket)
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
		slog.String("client", nameOf(c.socket)))
	c.Close()
}

// leave gives the place of a client back.
func (s *Server) leave(nc net.Conn) {
	if a := addressOf(nc); a.IsValid() {
		s.mu.Lock()
		if s.clients.from[a]--; s.clients.from[a] == 0 {
			delete(s.clients.from, a)
		}
		s.mu.Unlock()
	}
	<-s.seats()
	s.running.Done()
}
