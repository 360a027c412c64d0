package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"syscall"
	"time"
)

const (
	// Between attempts to accept a client.
	minAcceptPause = 5 * time.Millisecond
	maxAcceptPause = time.Second
)

// An acceptor accepts the clients of a listener, for one call of Serve.
type acceptor struct {
	listener net.Listener

	// These are guarded by the mu of the server.
	interrupted bool     // a hold has ended Accept by its deadline, or keeps it from being called
	stands      bool     // Accept is not called before the end of the hold
	waiting     net.Conn // unless nil, it was accepted, and waits for a place; Accept is not called meanwhile
}

// listen returns an acceptor, or nil if the server is closed. In a hold it returns after the end of
// that.
func (s *Server) listen(l net.Listener) *acceptor {
	a := &acceptor{listener: l}
	s.mu.Lock()
	if s.left {
		a.keepFile()
	}
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	if s.acceptors == nil {
		s.acceptors = make(map[*acceptor]struct{})
	}
	a.interrupted = s.held != nil
	s.acceptors[a] = struct{}{}
	s.mu.Unlock()
	s.stand(a)
	return a
}

func (s *Server) forget(a *acceptor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.acceptors, a)
	s.settle()
}

// accept waits out a hold, and what passes: a client that has gone already, and a lack of
// descriptors or memory, which clients can bring about.
func (s *Server) accept(a *acceptor) (net.Conn, error) {
	pause := minAcceptPause
	for {
		nc, err := a.listener.Accept()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && s.stand(a):
		case slices.ContainsFunc(passing, func(e syscall.Errno) bool { return errors.Is(err, e) }):
			s.logger().Warn("no client can be accepted at the moment",
				slog.Any("err", err), slog.Duration("pause", pause))
			select {
			case <-time.After(pause):
			case <-s.ending():
			}
			pause = min(2*pause, maxAcceptPause)
		default:
			return nc, err
		}
	}
}

// passing are the errors of accept(2) that say nothing of the listener.
var passing = []syscall.Errno{syscall.ECONNABORTED, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM}

func (s *Server) acceptError(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrServerClosed
	}
	return fmt.Errorf("server: accept: %w", err)
}

// admit gives a client that was accepted a place, as soon as there is one, and notes that it is in
// the handshake. A place is taken for a client, not for a listener that waits for one.
func (s *Server) admit(a *acceptor, nc net.Conn) error {
	seats := s.seats()
	select {
	case seats <- struct{}{}:
	default:
		s.mu.Lock()
		a.waiting = nc
		s.settle()
		s.mu.Unlock()
		select {
		case seats <- struct{}{}:
		case <-s.ending():
			return ErrServerClosed
		}
	}
	err := s.meet(nc, a)
	if err != nil {
		<-seats
	}
	return err
}

// stand has an acceptor that was interrupted by a hold wait for the end of that. It reports whether
// it was.
func (s *Server) stand(a *acceptor) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !a.interrupted {
		return false
	}
	for s.held != nil {
		a.stands = true
		s.settle()
		s.waitHeld()
	}
	a.interrupted, a.stands = false, false
	return true
}

// interrupt has Accept return, until resume is called. The caller holds the mu of the server.
func (a *acceptor) interrupt() error {
	a.interrupted = true
	err := a.listener.(deadliner).SetDeadline(interrupted)
	if errors.Is(err, net.ErrClosed) {
		return nil // Accept fails by itself.
	}
	return err
}

// resume lets Accept wait again. The caller holds the mu of the server.
func (a *acceptor) resume() {
	if d, ok := a.listener.(deadliner); ok {
		_ = d.SetDeadline(time.Time{}) // It fails on a closed listener.
	}
}

// keepFile has the file of a Unix socket stay when the listener is closed.
func (a *acceptor) keepFile() {
	if u, ok := a.listener.(interface{ SetUnlinkOnClose(bool) }); ok {
		u.SetUnlinkOnClose(false)
	}
}

// A deadliner is a listener whose Accept can be ended, and called again.
type deadliner interface{ SetDeadline(time.Time) error }
