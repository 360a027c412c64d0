package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/loglimit"
	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	defaultHandshakeTimeout = 10 * time.Second
	defaultMaxConnections   = 1024
	defaultMaxMemory        = 512 << 20

	// Between attempts to accept a client.
	minAcceptPause = 5 * time.Millisecond
	maxAcceptPause = time.Second
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
	// at most 8 KiB of them. It returns nil if there is no such export. It is called concurrently,
	// and may take as long as HandshakeTimeout. A client that lists exports is not told of what it
	// knows. nil: there are no others.
	Lookup func(name string) *Export
	// HandshakeTimeout is how long a client may take to choose. 0: 10 seconds.
	HandshakeTimeout time.Duration
	// MaxConnections bounds the clients that the server has at once, over all listeners; more of
	// them wait to be accepted, and one for each listener to be greeted. 0: 1024.
	MaxConnections int
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
	// Logger takes a record when a connection fails, of ten in ten seconds; how many more there
	// were is one record. Clients that leave before they have sent anything, as those of port
	// scanners and health checks do, are told of at level debug. nil: none.
	Logger *slog.Logger

	mu        sync.Mutex // guards all below
	closed    bool
	end       chan struct{} // unless nil, closed along with it
	listeners map[net.Listener]struct{}
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
	if !s.listen(l) {
		return ErrServerClosed
	}
	defer s.forget(l)

	seats := s.seats()
	for {
		nc, err := s.accept(l)
		if err != nil {
			return s.acceptError(err)
		}
		// A place is taken for a client, not for a listener that waits for one.
		select {
		case seats <- struct{}{}:
		case <-s.ending():
			nc.Close()
			return ErrServerClosed
		}
		if !s.meet(nc) {
			<-seats
			nc.Close()
			return ErrServerClosed
		}
		s.running.Add(1)
		go s.serve(nc)
	}
}

// export returns the export of a name, nil if there is none.
func (s *Server) export(name string) *Export {
	if e := s.Exports[name]; e != nil || s.Lookup == nil {
		return e
	}
	return s.Lookup(name)
}

// accept waits out what passes: a client that has gone already, and a lack of descriptors or
// memory, which clients can bring about.
func (s *Server) accept(l net.Listener) (net.Conn, error) {
	for pause := minAcceptPause; ; pause = min(2*pause, maxAcceptPause) {
		nc, err := l.Accept()
		if !slices.ContainsFunc(passing, func(e syscall.Errno) bool { return errors.Is(err, e) }) {
			return nc, err
		}
		s.logger().Warn("no client can be accepted at the moment", slog.Any("err", err), slog.Duration("pause", pause))
		select {
		case <-time.After(pause):
		case <-s.ending():
		}
	}
}

// passing are the errors of accept(2) that say nothing of the listener.
var passing = []syscall.Errno{syscall.ECONNABORTED, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM}

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

func (s *Server) acceptError(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrServerClosed
	}
	return fmt.Errorf("server: accept: %w", err)
}

// serve serves one client from its first byte to its last.
func (s *Server) serve(nc net.Conn) {
	defer s.running.Done()
	defer nc.Close()
	client := nc.RemoteAddr().String()
	session, err := s.greet(nc)
	if err != nil {
		switch {
		case err == ErrAborted, err == ErrServerClosed:
		case errors.Is(err, errSilent) && !errors.Is(err, os.ErrDeadlineExceeded):
			s.logger().Debug("client left without a word", slog.String("client", client))
		default:
			s.note(eventHandshake, client, err)
		}
		return
	}
	err = session.conn.Transmit()
	if err == nil || err == ErrShutdown {
		session.NetConn().Close() // Over TLS, the client is told that this is the end.
	}
	if err != nil && err != ErrShutdown && !errors.Is(err, net.ErrClosed) {
		s.note(eventClient, client, err)
	}
}

// note logs what became of a client, unless that would be too many.
func (s *Server) note(sort int, client string, err error) {
	s.mu.Lock()
	if s.events == nil {
		s.events = newEvents(s.Logger)
	}
	events := s.events
	s.mu.Unlock()
	events.Note(sort, func() slog.Record { return clientRecord(sort, client, err) })
}

// Shutdown stops accepting, cuts who has not chosen an export yet, lets every request that was read
// be answered, and then closes the connections. If ctx ends first, its error is returned and the
// rest goes on by itself; Close ends it.
func (s *Server) Shutdown(ctx context.Context) error {
	for c := range s.stop() {
		if err := c.stop(); err != nil {
			c.Close() // Its socket fails: there is nobody to be answered.
		}
	}
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
func (s *Server) Close() error {
	for c := range s.stop() {
		c.Close()
	}
	return nil
}

// stop closes everything but the connections, of which it returns a copy.
func (s *Server) stop() map[*Conn]struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end != nil && !s.closed {
		close(s.end)
	}
	s.closed = true
	for l := range s.listeners {
		l.Close()
	}
	for nc := range s.clients.talks {
		nc.Close()
	}
	conns := make(map[*Conn]struct{}, len(s.clients.conns))
	for c := range s.clients.conns {
		conns[c] = struct{}{}
	}
	return conns
}

func (s *Server) listen(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	if s.listeners == nil {
		s.listeners = make(map[net.Listener]struct{})
	}
	s.listeners[l] = struct{}{}
	return true
}

func (s *Server) forget(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}
