package blockdev

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/server"
)

// A socket stands in for what serves a connection: it serves until it is told otherwise.
type socket struct {
	result  chan error    // what Transmit returns, once
	stopped chan struct{} // closed when it begins nothing more

	mu       sync.Mutex // guards all below
	inFlight int
	served   uint64 // reads
	goodbye  bool
	away     bool
	absence  time.Duration
	closed   bool
}

// newSocket returns one that has carried a read.
func newSocket() *socket {
	return &socket{result: make(chan error, 2), stopped: make(chan struct{}), served: 1}
}

func (c *socket) Transmit() error          { return <-c.result }
func (c *socket) Stopped() <-chan struct{} { return c.stopped }

func (c *socket) Disconnected() bool     { return get(c, &c.goodbye) }
func (c *socket) Away() bool             { return get(c, &c.away) }
func (c *socket) Absence() time.Duration { return get(c, &c.absence) }

func (c *socket) Idle() bool { return nothing(c.Stats()) }

func get[T any](c *socket, p *T) T {
	c.mu.Lock()
	defer c.mu.Unlock()
	return *p
}

func set[T any](c *socket, p *T, v T) {
	c.mu.Lock()
	defer c.mu.Unlock()
	*p = v
}

func (c *socket) Stats() (s server.Stats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.InFlight, s.Read.Requests = c.inFlight, c.served
	return s
}

func (c *socket) Close() error {
	set(c, &c.closed, true)
	if get(c, &c.inFlight) == 0 { // Else it goes on until the backend has let go.
		c.end(net.ErrClosed)
	}
	return nil
}

// end has Transmit return.
func (c *socket) end(err error) {
	select {
	case c.result <- err:
	default: // It has, or will.
	}
}

// disconnect is the kernel's goodbye.
func (c *socket) disconnect() {
	set(c, &c.goodbye, true)
	c.end(nil)
}

// leave has the kernel give it up while the backend is at work.
func (c *socket) leave(inFlight int) {
	set(c, &c.inFlight, inFlight)
	close(c.stopped)
}

// A fakeSet is one of sockets, on a kernel that takes new ones.
type fakeSet struct {
	*connections
	misses  []error // guarded by the set's mu, as the next
	changes int

	fake    sync.Mutex // guards the two below
	sockets []*socket  // the first ones, and then those that were renewed
	refuses error      // what renew says
}

// setOf serves n sockets of a device that the kernel has. What tests look at is still after
// synctest.Wait.
func setOf(n int, timeout, deadTimeout time.Duration) *fakeSet {
	s := unattached(n, timeout, deadTimeout)
	s.attach()
	return s
}

// unattached is setOf while the kernel does not have the device yet.
func unattached(n int, timeout, deadTimeout time.Duration) *fakeSet {
	s := &fakeSet{connections: newConnections(timeout, deadTimeout, slog.New(slog.DiscardHandler))}
	s.renew = func(context.Context) (transmitter, error) {
		s.fake.Lock()
		defer s.fake.Unlock()
		if s.refuses != nil {
			return nil, s.refuses
		}
		c := newSocket()
		s.sockets = append(s.sockets, c)
		return c, nil
	}
	s.missed = func(err error) { s.misses = append(s.misses, err) }
	s.connections.changed = func() { s.changes++ }
	conns := make([]transmitter, n)
	for i := range conns {
		c := newSocket()
		s.sockets = append(s.sockets, c)
		conns[i] = c
	}
	s.serve(conns)
	return s
}

// refuse has renew return an error.
func (s *fakeSet) refuse(err error) {
	s.fake.Lock()
	defer s.fake.Unlock()
	s.refuses = err
}

// socket returns the one with that number.
func (s *fakeSet) socket(i int) *socket {
	s.fake.Lock()
	defer s.fake.Unlock()
	return s.sockets[i]
}

// check holds the state of the set, when nothing moves any more.
func (s *fakeSet) check(t *testing.T, what string, state nbdnl.State, alive int) {
	t.Helper()
	synctest.Wait()
	if got, n := s.state(), s.count(); got != state || n != alive {
		t.Errorf("%s: %s with %d alive, want %s with %d", what, got, n, state, alive)
	}
	ended := state == nbdnl.StateIdle || state == nbdnl.StateOrphaned && s.keepers == 0
	select {
	case <-s.done:
		if !ended {
			t.Errorf("%s: done", what)
		}
	default:
		if ended {
			t.Errorf("%s: not done", what)
		}
	}
}

// serve has existing connections served.
func (d *Device) serve(ends []link) {
	conns, err := d.transmitters(ends)
	if err != nil {
		panic(err)
	}
	d.conns.serve(conns)
}
