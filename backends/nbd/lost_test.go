package nbd_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server"
)

// TestReconnectSilent holds that a server that says nothing is given up, but not while nobody asks.
func TestReconnectSilent(t *testing.T) {
	m := newMemory(t, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		e, err := server.NewExport(m, server.Options{})
		if err != nil {
			t.Fatal(err)
		}
		s := &server.Server{Exports: map[string]*server.Export{"disk": e}}
		silent := 1 // connections that are to say nothing once negotiation has ended
		o := nbd.Options{Timeout: 30 * time.Second, Reconnect: new(nbd.Reconnect)}
		o.Dial = func(context.Context) (net.Conn, error) {
			near, far := net.Pipe()
			quiet := silent > 0
			silent--
			go func() {
				session, err := s.Handshake(far)
				switch {
				case err != nil:
				case quiet:
					io.Copy(io.Discard, far)
					session.Conn().Close()
				default:
					session.Conn().Transmit()
				}
			}()
			return near, nil
		}
		c, err := nbd.URI{Export: "disk"}.Dial(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		time.Sleep(time.Hour)
		begun := time.Now()
		_, err = c.ReadAt(make([]byte, 512), 0)
		if took := time.Since(begun); err != nil || took < 30*time.Second || took > 38*time.Second {
			t.Errorf("%v after %v", err, took)
		}
		if s := c.State(); s.Replaced != 1 || s.Alive != 1 {
			t.Errorf("the state is %+v", s)
		}
	})
}

// TestReconnectReset holds that nothing of a connection that is given up reaches the server later:
// it could be an old write, on top of what was written anew.
func TestReconnectReset(t *testing.T) {
	e, err := server.NewExport(newMemory(t, 16<<20), server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := &server.Server{Exports: map[string]*server.Export{"disk": e}}
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sessions := make(chan *server.Session, 1)
	go func() {
		if nc, err := l.Accept(); err == nil {
			if session, err := s.Handshake(nc); err == nil {
				sessions <- session
			}
		}
	}()
	c := dial(t, nbd.URI{Network: "tcp", Address: l.Addr().String(), Export: "disk"}, nbd.Options{})
	session := <-sessions
	defer session.Conn().Close()
	nc := session.NetConn()
	failed := make(chan error)
	go func() {
		_, err := c.WriteAt(make([]byte, 16<<20), 0) // More than the sockets hold.
		failed <- err
	}()
	if _, err := io.ReadFull(nc, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := <-failed; !errors.Is(err, net.ErrClosed) {
		t.Errorf("the write: %v", err)
	}
	n, err := io.Copy(io.Discard, nc)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after %d bytes: %v, want a reset", n, err)
	}
}

// TestReconnectPoison holds that a server that hangs up on each request is not asked again at once.
func TestReconnectPoison(t *testing.T) {
	m := newMemory(t, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		e, err := server.NewExport(m, server.Options{})
		if err != nil {
			t.Fatal(err)
		}
		s := &server.Server{Exports: map[string]*server.Export{"disk": e}}
		var dialled atomic.Int64
		o := nbd.Options{Reconnect: new(nbd.Reconnect), Dial: func(context.Context) (net.Conn, error) {
			dialled.Add(1)
			near, far := net.Pipe()
			go func() {
				if session, err := s.Handshake(far); err == nil {
					io.ReadFull(far, make([]byte, 28))
					session.Conn().Close()
				}
				far.Close()
			}()
			return near, nil
		}}
		c, err := nbd.URI{Export: "disk"}.Dial(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		begun := time.Now()
		_, err = c.ReadAt(make([]byte, 512), 0)
		if took := time.Since(begun); err == nil || took < time.Minute || took > 70*time.Second {
			t.Errorf("%v after %v", err, took)
		}
		if n := dialled.Load(); n > 30 {
			t.Errorf("%d connections in a minute", n)
		}
	})
}
