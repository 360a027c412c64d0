package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
)

// A ServerHold has a server stand still, so that another process can go on with its clients. It
// ends with Release or Leave, of which the first that is called counts, or with Shutdown or Close
// of the server. Its methods are safe for concurrent use.
type ServerHold struct {
	server  *Server
	cancel  context.CancelCauseFunc // of what Hold waits for
	still   chan struct{}           // closed when nobody is accepted any more, nor in the handshake
	release chan struct{}           // closed with the end

	// These are guarded by the mu of server.
	settled bool // still is closed
	exports map[*Export]*Hold
	ended   bool
}

// A Held is a client that another process can go on with. There, Server.Resume takes Agreement,
// Unread, and a connection made of a copy of the descriptor of NetConn. NetConn stays the server's.
type Held struct {
	*Session
	// Unread is what was received from the client and not executed.
	Unread []byte
}

// Hold has the server stand still. It accepts nobody, on all listeners: clients that connect wait
// in the backlogs of these, of which another process may have copies. Clients in the handshake are
// waited for until they have chosen an export or gone, as long as HandshakeTimeout at most. Then
// the exports of all clients are held (Export.Hold, not durable): when Hold returns, every request
// that was read is answered, and nothing more is read from anybody. An export is held with all its
// connections, also those that are not of this server.
//
// If ctx ends before, all goes on, and the error says what took too long: a request in the backend,
// for example, or a client that does not take its replies. While an export is waited for, the
// clients of the others wait, too. It is an error that matches errors.ErrUnsupported if a listener
// has no SetDeadline, as those of package net do, by which Accept is ended; nothing has changed
// then. The error is ErrServerClosed if Shutdown or Close came first. A Hold that was there before
// is waited for.
//
// While the server is held, Serve, Handshake, Resume and what changes a held export wait.
func (s *Server) Hold(ctx context.Context) (*ServerHold, error) {
	h, ctx, err := s.standStill(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case <-h.still:
		err = h.holdExports(ctx)
	case <-ctx.Done():
		err = fmt.Errorf("server: hold: clients in the handshake have not come to an end: %w", context.Cause(ctx))
	}
	if err != nil {
		h.Release()
		if errors.Is(err, ErrServerClosed) {
			err = ErrServerClosed
		}
		return nil, err
	}
	return h, nil
}

// standStill begins a hold, and returns the context of what there is to wait for.
func (s *Server) standStill(ctx context.Context) (*ServerHold, context.Context, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.held != nil && !s.closed {
		before := s.held
		s.mu.Unlock()
		select {
		case <-before.release:
			s.mu.Lock()
		case <-ctx.Done():
			s.mu.Lock()
			return nil, nil, fmt.Errorf("server: hold: the server is held by another call: %w", context.Cause(ctx))
		}
	}
	if s.closed {
		return nil, nil, ErrServerClosed
	}
	for a := range s.acceptors {
		if _, ok := a.listener.(deadliner); !ok {
			return nil, nil, fmt.Errorf("server: hold: a %T has no SetDeadline: %w", a.listener, errors.ErrUnsupported)
		}
	}
	h := &ServerHold{
		server:  s,
		still:   make(chan struct{}),
		release: make(chan struct{}),
		exports: make(map[*Export]*Hold),
	}
	for a := range s.acceptors {
		if err := a.interrupt(); err != nil {
			for a := range s.acceptors {
				a.resume()
			}
			return nil, nil, fmt.Errorf("server: hold: interrupt Accept: %w: %w", err, errors.ErrUnsupported)
		}
	}
	ctx, h.cancel = context.WithCancelCause(ctx)
	s.held = h
	s.settle()
	return h, ctx, nil
}

// settle notes it if the server has come to stand still: nobody is accepted any more, nor in the
// handshake. The caller holds mu.
func (s *Server) settle() {
	h := s.held
	if h == nil || h.settled || len(s.clients.talks) > 0 {
		return
	}
	for a := range s.acceptors {
		if !a.stands && a.waiting == nil {
			return
		}
	}
	h.settled = true
	close(h.still)
}

// waitHeld waits for the end of the hold. The caller holds mu, which is free meanwhile.
func (s *Server) waitHeld() {
	h := s.held
	s.mu.Unlock()
	<-h.release
	s.mu.Lock()
}

// holdExports holds the exports of all clients, at once, so that none of them waits for each of the
// others in turn.
func (h *ServerHold) holdExports(ctx context.Context) error {
	s := h.server
	s.mu.Lock()
	names := make(map[*Export]string)
	for _, session := range s.clients.conns {
		names[session.export] = session.Agreement.Export
	}
	s.mu.Unlock()
	results := make(chan error)
	for e, name := range names {
		go func() {
			err := h.holdExport(ctx, e)
			if err != nil {
				err = fmt.Errorf("server: hold: export %q: %w", name, err)
			}
			results <- err
		}()
	}
	var all []error
	for range names {
		all = append(all, <-results)
	}
	return errors.Join(all...)
}

func (h *ServerHold) holdExport(ctx context.Context, e *Export) error {
	held, err := e.Hold(ctx, false)
	if err != nil {
		return err
	}
	h.server.mu.Lock()
	ended := h.ended
	if !ended {
		h.exports[e] = held
	}
	h.server.mu.Unlock()
	if ended {
		held.Release()
		return ErrServerClosed
	}
	return nil
}

// Sessions returns the clients that another process can go on with: those that have chosen an
// export, are there, and do not talk over TLS. They are of no use after the end of the hold, and
// there are none then.
func (h *ServerHold) Sessions() []Held {
	s := h.server
	s.mu.Lock()
	sessions := slices.Collect(maps.Values(s.clients.conns))
	exports := h.exports
	s.mu.Unlock()
	var all []Held
	for _, session := range sessions {
		held := exports[session.export]
		if held == nil || session.conn.agreed.TLS {
			continue
		}
		if unread, ok := held.Unread(session.conn); ok {
			all = append(all, Held{session, unread})
		}
	}
	return all
}

// Waiting returns connections that were accepted and wait for one of the MaxConnections to go, at
// most one for each listener. Not a byte of them was read or written: another process serves them
// from the beginning, over copies of their descriptors. Leave cuts those of which there are none.
func (h *ServerHold) Waiting() []net.Conn {
	s := h.server
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []net.Conn
	for a := range s.acceptors {
		if a.waiting != nil && !h.ended {
			all = append(all, a.waiting)
		}
	}
	return all
}

// Release lets all go on as if nothing had been.
func (h *ServerHold) Release() { h.end(false) }

// Leave leaves the clients to another process, and closes the server, as Shutdown does; that can be
// called to wait for the end.
//
//   - The connections of Sessions and Waiting are closed, some time after Leave has returned.
//     Nothing is read or written over them any more, and they are not shut down: where there is a
//     copy of the descriptor, they go on.
//   - Clients over TLS have got all replies that were due. They are told the end (close_notify),
//     and waited for until they have hung up, for 5 seconds at most. What they have sent since the
//     beginning of the hold is not executed.
//   - Listeners are closed, and Serve returns ErrServerClosed. The file of a Unix socket stays,
//     also that of a listener which is given to Serve later.
//   - Connections of the held exports that are not of this server end, too: Transmit returns
//     ErrShutdown.
func (h *ServerHold) Leave() { h.end(true) }

func (h *ServerHold) end(leave bool) {
	s := h.server
	s.mu.Lock()
	if h.ended {
		s.mu.Unlock()
		return
	}
	h.ended, s.held = true, nil
	exports := h.exports
	var conns map[*Conn]*Session
	for a := range s.acceptors {
		if leave {
			a.keepFile()
		} else {
			a.resume()
		}
	}
	if leave {
		s.left = true
		conns = s.stop()
	}
	s.mu.Unlock()
	h.cancel(ErrServerClosed)
	stopAll(conns)
	for _, held := range exports {
		if leave {
			held.Leave()
		} else {
			held.Release()
		}
	}
	close(h.release)
}

// unhold ends the hold, if there is one.
func (s *Server) unhold() {
	s.mu.Lock()
	h := s.held
	s.mu.Unlock()
	if h != nil {
		h.Release()
	}
}
