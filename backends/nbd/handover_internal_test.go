//go:build unix && !aix

package nbd

import (
	"context"
	"errors"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/server/wire"
)

// single returns a client with one connection over TCP, to a server that says nothing.
func single(t *testing.T) (*Client, *conn) {
	t.Helper()
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s := &Session{NetConn: nc, Agreement: Agreement{Info: Info{Size: 1 << 20, Flags: wire.FlagHasFlags}}}
	c, err := s.Client(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, c.conns[0].Load()
}

// TestHandOverSending holds that HandOver waits for whoever is still sending what was answered, but
// not for longer than a second, and not if the connection is lost meanwhile.
func TestHandOverSending(t *testing.T) {
	for name, tt := range map[string]struct {
		happens func(k *conn)
		alive   int
		atLeast time.Duration
	}{
		"it ends":    {func(k *conn) { k.sending.Lock(); k.rest(); k.sending.Unlock() }, 1, 0},
		"it is lost": {func(k *conn) { k.fail(errMissing) }, 0, 0},
		"it goes on": {func(*conn) {}, 0, settling},
	} {
		t.Run(name, func(t *testing.T) {
			c, k := single(t)
			k.sending.Lock()
			k.busy = true
			k.sending.Unlock()
			go func() {
				for waits := false; !waits; runtime.Gosched() {
					k.sending.Lock()
					waits = k.rested != nil
					k.sending.Unlock()
				}
				tt.happens(k)
			}()
			begun := time.Now()
			h, err := c.HandOver()
			if err != nil {
				t.Fatal(err)
			}
			took := time.Since(begun)
			if n := len(h.Files); n != tt.alive || took < tt.atLeast || took-tt.atLeast > settling/2 {
				t.Errorf("after %v %d connections go along, want %d", took, n, tt.alive)
			}
			h.Resume()
		})
	}
}

// TestHandOverRetired holds that a connection stays here whose server is shutting down.
func TestHandOverRetired(t *testing.T) {
	c, k := single(t)
	k.retired.Store(true)
	h, err := c.HandOver()
	if err != nil || len(h.Files) > 0 {
		t.Fatalf("%v, %+v", err, h)
	}
	h.Resume()
}

// TestHandOverFails holds that a connection that is lost while it is handed over keeps nobody who
// waits for it.
func TestHandOverFails(t *testing.T) {
	for _, resumes := range []bool{true, false} {
		c, k := single(t)
		h, err := c.HandOver()
		if err != nil || len(h.Files) != 1 {
			t.Fatalf("%v, %+v", err, h)
		}
		failed := make(chan error)
		go func() {
			_, err := c.WriteAt(make([]byte, 100<<10), 0)
			failed <- err
		}()
		for k.inFlight.Load() == 0 {
			runtime.Gosched()
		}
		k.fail(errMissing)
		others() // The helper goes.
		if resumes {
			h.Resume()
		} else {
			h.Leave()
		}
		if err := <-failed; !errors.Is(err, errMissing) {
			t.Errorf("the write: %v", err)
		}
	}
}

// A hooked connection has something happen before a deadline is set, or taken back.
type hooked struct {
	net.Conn
	before func(t time.Time)
}

func (h *hooked) SetReadDeadline(t time.Time) error {
	h.before(t)
	return h.Conn.SetReadDeadline(t)
}

// hook makes a connection over a pipe, whose near end it returns, and tells before of deadlines.
func hook(before func(k *conn, far net.Conn, t time.Time)) (*conn, net.Conn) {
	near, far := net.Pipe()
	h := &hooked{Conn: near}
	s := &Session{NetConn: h, Agreement: Agreement{Info: Info{Size: 512, Flags: wire.FlagHasFlags}}}
	var k *conn
	h.before = func(t time.Time) { before(k, far, t) }
	k = newConn(s, &Options{MaxInFlight: 1})
	return k, near
}

// others has the other goroutines come as far as they can.
func others() {
	for range 1000 {
		runtime.Gosched()
	}
}

// TestParkInterrupted holds that a receiver parks also if it is told so just when it takes back the
// deadline by which somebody else has woken it.
func TestParkInterrupted(t *testing.T) {
	parked := make(chan bool)
	once := new(sync.Once)
	k, near := hook(func(k *conn, _ net.Conn, at time.Time) {
		if at.IsZero() {
			once.Do(func() {
				go func() { parked <- k.park(context.Background()) }()
				others()
			})
		}
	})
	near.SetReadDeadline(longAgo)
	if !<-parked {
		t.Error("it does not stand still")
	}
	k.close()
}

// TestParkEnds holds that nobody waits for a receiver that ends just when it is to park.
func TestParkEnds(t *testing.T) {
	k, _ := hook(func(_ *conn, far net.Conn, at time.Time) {
		far.Close()
		others()
	})
	if k.park(context.Background()) {
		t.Error("a connection that has ended stands still")
	}
	k.close()
}
