package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/loglimit"
	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	defaultHandshakeTimeout = 10 * time.Second
	defaultMaxConnections   = 1024
	defaultMaxMemory        = 512 << 20
)

// ErrServerClosed is what Serve returns after Shutdown and Close.
var ErrServerClosed = errors.New("server: closed")

// A Server offers exports by name to clients that connect to it and negotiate ("fixed newstyle" of
// the NBD protocol document). Its fields are not to be changed while it serves. Its methods are
// safe for concurrent use.
type Server struct {
	// Exports, by name: wire.CheckString tells which are possible. A client that names none gets
	// the one named "".
	Exports map[string]*Export
	// Lookup is asked for what is not in Exports, with a name that a client has chosen: any bytes,
	// at most 8 KiB of them. It returns nil if there is no such export, and else, unless that is
	// nil, what is to be called once when the client that has asked is done with it: a connection
	// is when nothing of it is in the backend any more. It is called concurrently, several times
	// for a client perhaps, and may take as long as HandshakeTimeout. nil: there are no others.
	Lookup func(name string) (e *Export, done func())
	// List has the names, each with a description or "", that a client is told which lists the
	// exports. nil: those of Exports, in the order of their names.
	List iter.Seq2[string, string]
	// HandshakeTimeout is how long a client may take to choose. 0: 10 seconds.
	HandshakeTimeout time.Duration
	// MaxConnections bounds the clients that the server has at once, over all listeners; more of
	// them wait to be accepted, and one for each listener to be greeted. 0: 1024.
	MaxConnections int
	// MaxPerAddress bounds the clients that one address has at once: an IPv4 address, or the first
	// 64 bits of an IPv6 address. More of them are cut. Clients by other than IP are not counted.
	// 0: a quarter of MaxConnections, at least 1.
	MaxPerAddress int
	// MaxOptions bounds how many options one client may send in the negotiation; each has at most 8
	// KiB that are looked at. 0: 1024.
	MaxOptions int
	// MaxMemory bounds the memory for the data of requests, in bytes, for the clients of each
	// export together; 64 MiB of it may be one client's. Half of it is theirs in equal shares, as
	// many as MaxConnections, so that a client whose requests in flight fit in its share never
	// waits for others (256 KiB, unless one of the two is set). The other half goes first come,
	// first served to what does not fit. While a request waits there for long, a client is
	// disconnected that takes longer than about 20 seconds for the replies that are ready for it,
	// or to send the data of a write. On top come the buffers of each client, which are smaller
	// than 4 MiB, and what was received of the writes that a Swap or Resize interrupts. 0: 512 MiB.
	MaxMemory int64
	// TLS is what clients that ask for it (NBD_OPT_STARTTLS) talk over. Versions below 1.2 are
	// refused, whatever it says. Certificates change without a restart by its GetCertificate or
	// GetConfigForClient. It may be shared, and is not changed. nil: who asks is told that there is
	// none.
	TLS *tls.Config
	// RequireTLS has a client told nothing in plain text but that TLS is required.
	RequireTLS bool
	// MaxTLSHandshakes bounds how many TLS handshakes are computed at once; those that wait for
	// their client do not count. 0: half of GOMAXPROCS, and at least one.
	MaxTLSHandshakes int
	// Logger takes a record for each client that had an export, when it has gone: who it was, what
	// was agreed, what it moved, how it ended; and one for each that came to none, unless it wanted
	// none. Of each sort there are ten in ten seconds; how many more there were is one record.
	// Clients that leave before they have sent anything, as those of port scanners and health
	// checks do, are told of at level debug. nil: none.
	Logger *slog.Logger

	mu        sync.Mutex // guards all below
	closed    bool
	cut       bool          // by Close
	left      bool          // to another process
	end       chan struct{} // unless nil, closed along with it
	acceptors map[*acceptor]struct{}
	held      *ServerHold // unless nil, nobody is accepted before its end
	clients   clients
	security  security
	events    *loglimit.Limiter
	running   sync.WaitGroup // of clients, and of serve; grows only while closed is false
}

func (s *Server) handshakeTimeout() time.Duration {
	if s.HandshakeTimeout > 0 {
		return s.HandshakeTimeout
	}
	return defaultHandshakeTimeout
}

func (s *Server) logger() *slog.Logger {
	if s.Logger != nil {
		return s.Logger
	}
	return slog.New(slog.DiscardHandler)
}

// Serve accepts connections from l and serves each of them until its client goes. It blocks until l
// fails or the server is shut down, closes l in any case, and does not wait for the connections:
// Shutdown does. Its error is never nil, and is ErrServerClosed after Shutdown and Close. An export
// that no client could ask for is an error at once. It may be called for several listeners.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	for _, name := range slices.Sorted(maps.Keys(s.Exports)) {
		if err := wire.CheckString(name); err != nil {
			return fmt.Errorf("server: export name: %w", err)
		}
		if s.Exports[name] == nil {
			return fmt.Errorf("server: export %q is nil", name)
		}
	}
	if s.RequireTLS && s.TLS == nil {
		return errors.New("server: TLS is required, and there is no configuration for it")
	}
	a := s.listen(l)
	if a == nil {
		return ErrServerClosed
	}
	defer s.forget(a)

	for {
		nc, err := s.accept(a)
		if err != nil {
			return s.acceptError(err)
		}
		if err := s.admit(a, nc); err != nil {
			nc.Close()
			if err == ErrServerClosed {
				return err
			}
			s.note(eventHandshake, func() slog.Record { return handshakeRecord(nameOf(nc), err) })
			continue
		}
		s.running.Add(1)
		go s.serve(nc)
	}
}

// A lease is an export that a client was given, until done is called.
type lease struct {
	*Export
	release func() // nil: nobody wants to know
}

func (l lease) done() {
	if l.release != nil {
		l.release()
	}
}

// export returns the export of a name, or none.
func (s *Server) export(name string) lease {
	if e := s.Exports[name]; e != nil || s.Lookup == nil {
		return lease{e, nil}
	}
	e, done := s.Lookup(name)
	return lease{e, done}
}

// ending returns a channel that is closed when the server is.
func (s *Server) ending() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end == nil {
		s.end = make(chan struct{})
		if s.closed {
			close(s.end)
		}
	}
	return s.end
}

// serve serves one client from its first byte to its last.
func (s *Server) serve(nc net.Conn) {
	defer s.running.Done()
	defer nc.Close()
	client := nameOf(nc)
	session, err := s.greet(nc)
	if err != nil {
		switch {
		case err == ErrAborted, err == ErrServerClosed:
		case errors.Is(err, errSilent) && !errors.Is(err, os.ErrDeadlineExceeded):
			s.logger().Debug("client left without a word", slog.String("client", client))
		default:
			s.note(eventHandshake, func() slog.Record { return handshakeRecord(client, err) })
		}
		return
	}
	_ = s.transmit(session) // It is in the log.
}

// note logs what became of a client, unless that would be too many.
func (s *Server) note(sort int, record func() slog.Record) {
	s.mu.Lock()
	if s.events == nil {
		s.events = newEvents(s.Logger)
	}
	events := s.events
	s.mu.Unlock()
	events.Note(sort, record)
}

// Shutdown stops accepting, cuts who has not chosen an export yet, lets every request that was read
// be answered, and then closes the connections. Clients over TLS are told the end, and have 5
// seconds to hang up. If ctx ends first, its error is returned and the rest goes on by itself;
// Close ends it. A ServerHold ends with it.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	conns := s.stop()
	s.mu.Unlock()
	stopAll(conns)
	s.unhold()
	done := make(chan struct{})
	go func() {
		s.running.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("server: shut down: %w", ctx.Err())
	}
}

// Close stops accepting and cuts all connections. It does not wait for the backend calls in flight.
// A ServerHold ends with it.
func (s *Server) Close() error {
	s.mu.Lock()
	conns := s.stop()
	s.cut = true
	for nc := range s.clients.parting {
		nc.Close()
	}
	s.mu.Unlock()
	for c := range conns {
		c.Close()
	}
	s.unhold()
	return nil
}

// stopAll has connections end when what was read of them is answered.
func stopAll(conns map[*Conn]*Session) {
	for c := range conns {
		if err := c.stop(); err != nil {
			c.Close() // Its socket fails: there is nobody to be answered.
		}
	}
}

// stop closes everything but the connections, of which it returns a copy. The caller holds mu.
func (s *Server) stop() map[*Conn]*Session {
	if s.end != nil && !s.closed {
		close(s.end)
	}
	s.closed = true
	for a := range s.acceptors {
		a.listener.Close()
	}
	for nc := range s.clients.talks {
		nc.Close()
	}
	return maps.Clone(s.clients.conns)
}
