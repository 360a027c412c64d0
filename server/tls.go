package server

import (
	"crypto/tls"
	"fmt"
	"net"
	"runtime"

	"github.com/nbdctl/nbdctl/server/internal/rawio"
)

// security is what a server has for TLS.
type security struct {
	config *tls.Config
	turns  chan struct{} // as many values as handshakes may be computed at once
}

// startTLS has the client of nc begin TLS, within the deadlines of nc.
func (s *Server) startTLS(nc net.Conn) (*tls.Conn, error) {
	config, turns := s.secure()
	under := rawio.NewUnder(nc)
	under.Conn = &turnConn{Conn: nc, turns: turns} // until the handshake is over
	over := tls.Server(under, config)
	<-turns
	err := over.Handshake()
	turns <- struct{}{}
	under.Conn = nc
	if err != nil {
		return nil, err
	}
	if v := over.ConnectionState().Version; v < tls.VersionTLS12 {
		return nil, fmt.Errorf("version %s: 1.2 is the least that is served", tls.VersionName(v))
	}
	return over, nil
}

// secure returns the configuration and the turns of TLS handshakes.
func (s *Server) secure() (*tls.Config, chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.security.config == nil {
		config := s.TLS.Clone()
		// It begins with records of a packet each, which helps those who show the first bytes
		// early.
		config.DynamicRecordSizingDisabled = true
		n := s.MaxTLSHandshakes
		if n <= 0 {
			n = max(1, runtime.GOMAXPROCS(0)/2)
		}
		turns := make(chan struct{}, n)
		for range n {
			turns <- struct{}{}
		}
		s.security = security{config, turns}
	}
	return s.security.config, s.security.turns
}

// A turnConn carries a TLS handshake, which holds one of the turns but while it waits for the
// client: so many handshakes do not keep the processors from who is being served, and no client
// keeps others from theirs.
type turnConn struct {
	net.Conn
	turns chan struct{}
}

func (c *turnConn) Read(p []byte) (int, error) {
	c.turns <- struct{}{}
	defer func() { <-c.turns }()
	return c.Conn.Read(p)
}

func (c *turnConn) Write(p []byte) (int, error) {
	c.turns <- struct{}{}
	defer func() { <-c.turns }()
	return c.Conn.Write(p)
}

// socketOf returns what a connection stands on: itself, unless it is one over TLS. To close that
// cuts the client, where to close TLS may wait for it.
func socketOf(nc net.Conn) net.Conn {
	if over, ok := nc.(*tls.Conn); ok {
		nc = over.NetConn()
	}
	if under, ok := nc.(*rawio.Under); ok {
		nc = under.Conn
	}
	return nc
}
