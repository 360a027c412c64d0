//go:build unix && !aix

package nbd

import (
	"context"
	"errors"
	"net"
	"runtime"
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
		for range 100 { // The helper goes.
			runtime.Gosched()
		}
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

// A hooked connection has something happen before its deadline is taken back.
type hooked struct {
	net.Conn
	before func()
}

func (h *hooked) SetReadDeadline(t time.Time) error {
	if t.IsZero() && h.before != nil {
		h.before()
	}
	return h.Conn.SetReadDeadline(t)
}

// TestParkInterrupted holds that a receiver parks also if it is told so just when it takes back the
// deadline by which somebody else has woken it.
func TestParkInterrupted(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	parked := make(chan bool)
	h := &hooked{Conn: near}
	s := &Session{NetConn: h, Agreement: Agreement{Info: Info{Size: 512, Flags: wire.FlagHasFlags}}}
	var k *conn
	h.before = func() {
		h.before = nil
		go func() { parked <- k.park(context.Background()) }()
		for range 1000 { // It comes as far as it can.
			runtime.Gosched()
		}
	}
	k = newConn(s, &Options{MaxInFlight: 1})
	near.SetReadDeadline(longAgo)
	if !<-parked {
		t.Error("it does not stand still")
	}
	k.close()
}
