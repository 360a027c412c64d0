package server_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// A pausable offers connections in memory to a server that can be held.
type pausable struct {
	*dialer
	refuse error    // of SetDeadline
	last   net.Conn // accepted in the moment in which Accept is ended

	mu   sync.Mutex // guards the one below
	past chan struct{}
}

func newPausable() *pausable { return &pausable{dialer: newDialer(), past: make(chan struct{})} }

func (l *pausable) SetDeadline(t time.Time) error {
	if l.refuse != nil {
		return l.refuse
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.IsZero() {
		l.past = make(chan struct{})
	} else {
		close(l.past)
	}
	return nil
}

func (l *pausable) Accept() (net.Conn, error) {
	l.mu.Lock()
	past := l.past
	l.mu.Unlock()
	select {
	case <-past:
		return nil, os.ErrDeadlineExceeded
	default:
	}
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-past:
		if c := l.last; c != nil {
			l.last = nil
			return c, nil
		}
		return nil, os.ErrDeadlineExceeded
	}
}

// An attempt to hold a server.
type attempt struct {
	hold *server.ServerHold
	err  error
	took time.Duration
}

// try has a server stand still, and returns what takes the outcome.
func try(ctx context.Context, s *server.Server) <-chan attempt {
	result, begun := make(chan attempt, 1), time.Now()
	go func() {
		h, err := s.Hold(ctx)
		result <- attempt{h, err, time.Since(begun)}
	}()
	return result
}

// TestHoldHandshake holds that clients in the handshake are waited for, also one that was accepted
// in the moment of the call, and that one which says nothing is for as long as it may.
func TestHoldHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server.Server{Exports: exports(t), HandshakeTimeout: time.Minute}
		l := newPausable()
		serveOn(t, s, l)
		early := l.dial(t, "-")
		greeted(t, early)
		late, theirs := net.Pipe()
		defer late.Close()
		synctest.Wait() // The listener waits for another client.
		l.last = theirs
		result := try(t.Context(), s)
		greeted(t, late)
		choose(t, late, "")
		synctest.Wait()
		if len(result) > 0 {
			t.Fatal("a client in the handshake was not waited for")
		}
		handshake := make(chan error, 1)
		go func() { // One that has come elsewhere waits.
			_, err := s.Handshake(nobody())
			handshake <- err
		}()
		synctest.Wait()
		if len(handshake) > 0 {
			t.Error("Handshake has not waited")
		}
		choose(t, early, "disk")
		a := <-result
		if a.err != nil || len(a.hold.Sessions()) != 2 {
			t.Fatalf("%v, clients %+v", a.err, a.hold.Sessions())
		}
		waiting := later(&session{client: newClient(t, early)}, call{op: cmdRead, length: 512})
		synctest.Wait()
		if len(waiting) > 0 {
			t.Error("a request was answered in the hold")
		}
		a.hold.Release()
		answered(t, waiting, "the one that waited")
		checkError(t, <-handshake, io.ErrClosedPipe)

		silent := l.dial(t, "-")
		greeted(t, silent)
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if a := <-try(short, s); !errors.Is(a.err, context.DeadlineExceeded) || a.took != time.Second {
			t.Errorf("beside a silent client: %v after %v", a.err, a.took)
		}
		newClient(t, l.dial(t, "")).expect(0, call{op: cmdRead, length: 512})
		a = <-try(t.Context(), s)
		if a.err != nil || a.took != 59*time.Second || len(a.hold.Sessions()) != 3 {
			t.Errorf("beside a silent client: %v after %v", a.err, a.took)
		}
		a.hold.Leave()
		if _, err := silent.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the silent client hears %v", err)
		}
	})
}

// TestHoldFull holds that a client which waits for a place is not waited for, and stays as it is:
// it has its turn after the hold, or another server serves it from the beginning.
func TestHoldFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server.Server{Exports: exports(t), MaxConnections: 1}
		l, other := newPausable(), newPausable()
		serveOn(t, s, l)
		serving := serveOn(t, s, other)
		first, second := l.dial(t, ""), l.dial(t, "-")
		synctest.Wait()
		h := hold(t, s)
		if len(h.Sessions()) != 1 || len(h.Waiting()) != 1 {
			t.Errorf("clients %v, and waiting %v", h.Sessions(), h.Waiting())
		}
		h.Release()
		if n := len(h.Sessions()) + len(h.Waiting()); n > 0 {
			t.Errorf("%d clients go along after the hold", n)
		}
		first.Close()
		greeted(t, second)
		choose(t, second, "")
		newClient(t, second).expect(0, call{op: cmdRead, length: 512})
		synctest.Wait()        // Both listeners wait for a client.
		_, l.last = net.Pipe() // accepted in the moment of the call
		h = hold(t, s)
		if len(h.Sessions()) != 1 || len(h.Waiting()) != 1 {
			t.Errorf("clients %v, and waiting %v", h.Sessions(), h.Waiting())
		}
		h.Waiting()[0].Close()
		h.Release()
		second.Close()
		synctest.Wait()
		h = hold(t, s)
		if n := len(h.Sessions()) + len(h.Waiting()); n > 0 {
			t.Errorf("%d clients go along of none", n)
		}
		h.Release()

		// A place that becomes free in the hold makes no difference.
		_, session := negotiated(t, s, "")
		third := l.dial(t, "-")
		synctest.Wait()
		h = hold(t, s)
		session.Conn().Close()
		heard := make(chan error, 1)
		go func() {
			_, err := third.Read(make([]byte, 1))
			heard <- err
		}()
		synctest.Wait()
		if len(heard) > 0 || len(h.Sessions()) != 0 || len(h.Waiting()) != 1 {
			t.Errorf("clients %v, and waiting %v", h.Sessions(), h.Waiting())
		}
		h.Leave()
		if err := <-heard; err != io.EOF {
			t.Errorf("who was left hears %v", err)
		}
		checkError(t, <-serving, server.ErrServerClosed)
	})
}

// TestHoldLate holds that what begins in a hold waits for its end: Serve, Handshake, Resume, and
// another Hold.
func TestHoldLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server.Server{Exports: exports(t)}
		_, session := negotiated(t, s, "")
		h := hold(t, s)
		defer h.Release()
		var over sync.WaitGroup
		begun := func(err error) {
			if err != nil {
				t.Error(err)
			}
			if n := len(h.Sessions()); n > 0 {
				t.Errorf("something ended in the hold of %d clients", n)
			}
		}
		l := newDialer() // As long as it does not have to be stopped, it need not be possible.
		serveOn(t, s, l)
		over.Go(func() {
			nc := l.dial(t, "-") // It returns when the connection is accepted.
			begun(nil)
			greeted(t, nc)
		})
		over.Go(func() {
			ours, theirs := net.Pipe()
			defer ours.Close()
			go io.WriteString(ours, clientFlags(3)+option(optExportName, ""))
			go io.Copy(io.Discard, ours)
			_, err := s.Handshake(theirs)
			begun(err)
		})
		over.Go(func() {
			_, theirs := net.Pipe()
			_, err := s.Resume(theirs, session.Agreement, nil)
			begun(err)
		})
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		a := <-try(short, s)
		checkError(t, a.err, context.DeadlineExceeded)
		synctest.Wait()
		h.Release()
		over.Wait()
		// Now a listener is there that can't be stopped.
		if a := <-try(t.Context(), s); !errors.Is(a.err, errors.ErrUnsupported) {
			t.Errorf("a listener without SetDeadline: %v", a.err)
		}
		l.Close()
		synctest.Wait()
		h = hold(t, s)
		second := try(t.Context(), s)
		synctest.Wait()
		if len(second) > 0 {
			t.Error("two holds at once")
		}
		h.Release()
		a = <-second
		checkError(t, a.err, nil)
		handshake := make(chan error)
		go func() {
			_, err := s.Handshake(nobody())
			handshake <- err
		}()
		third := try(t.Context(), s)
		synctest.Wait()
		a.hold.Leave()
		checkError(t, <-handshake, server.ErrServerClosed)
		checkError(t, (<-third).err, server.ErrServerClosed)
		checkError(t, (<-try(t.Context(), s)).err, server.ErrServerClosed)
	})
}

// nobody is a connection with nobody at the other end.
func nobody() net.Conn {
	ours, theirs := net.Pipe()
	ours.Close()
	return theirs
}

// TestHoldRefused holds that nothing changes where a listener can't be stopped, and what becomes of
// a listener that ends by itself.
func TestHoldRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, odd := range map[string]interface {
			net.Listener
			dial(*testing.T, string) net.Conn
		}{
			"none":    newDialer(),
			"refuses": &pausable{dialer: newDialer(), past: make(chan struct{}), refuse: os.ErrNoDeadline},
		} {
			s := &server.Server{Exports: exports(t)}
			l := newPausable()
			serveOn(t, s, l)
			serveOn(t, s, odd)
			synctest.Wait()
			for range 20 { // Some listeners come before it, and some behind it.
				if a := <-try(t.Context(), s); !errors.Is(a.err, errors.ErrUnsupported) {
					t.Errorf("%s: %v", name, a.err)
				}
				synctest.Wait()
			}
			for range 2 {
				newClient(t, l.dial(t, "")).expect(0, call{op: cmdRead, length: 512})
				newClient(t, odd.dial(t, "")).expect(0, call{op: cmdRead, length: 512})
			}
		}
		s := &server.Server{Exports: exports(t)}
		l := newPausable()
		serving := serveOn(t, s, l)
		gone := &pausable{dialer: newDialer(), past: make(chan struct{}), refuse: net.ErrClosed}
		serveOn(t, s, gone)
		synctest.Wait()
		held := try(t.Context(), s)
		synctest.Wait()
		if len(held) > 0 {
			t.Error("the end of a listener was not waited for")
		}
		gone.Close()
		h := (<-held).hold
		h.Release()
		h.Leave() // comes too late
		newClient(t, l.dial(t, "")).expect(0, call{op: cmdRead, length: 512})
		synctest.Wait()
		l.SetDeadline(time.Unix(1, 0))
		checkError(t, <-serving, os.ErrDeadlineExceeded)
	})
}
