package server_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// A stuck server has an export whose requests hang, and another one.
type stuck struct {
	*server.Server
	*pausable
	release chan struct{}
	serving <-chan error
	hanging *client
	reply   <-chan reply // to what hangs
	other   *client
}

func newStuck(t *testing.T) *stuck {
	disk := newDisk(8192)
	k := &stuck{pausable: newPausable(), release: make(chan struct{})}
	disk.before = func(op string, _, _ int64) error {
		if op == "read" {
			<-k.release
		}
		return nil
	}
	k.Server = &server.Server{Exports: exports(t)}
	k.Exports["stuck"] = export(t, disk, server.Options{})
	k.serving = serveOn(t, k.Server, k.pausable)
	k.hanging, k.other = newClient(t, k.dial(t, "stuck")), newClient(t, k.dial(t, ""))
	k.reply = k.hanging.start(call{op: cmdRead, length: 512})
	synctest.Wait()
	return k
}

func (k *stuck) Close() error { return k.Server.Close() }

// TestHoldStuck holds that a hold which does not come about in time leaves no trace.
func TestHoldStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newStuck(t)
		cause := errors.New("no more patience")
		for range 3 {
			short, cancel := context.WithTimeoutCause(t.Context(), time.Second, cause)
			a := <-try(short, k.Server)
			cancel()
			if !errors.Is(a.err, cause) || a.took != time.Second {
				t.Errorf("%v after %v", a.err, a.took)
			}
			for _, c := range []*client{k.hanging, k.other, newClient(t, k.dial(t, "stuck"))} {
				c.expect(0, call{op: cmdFlush})
			}
		}
		held := try(t.Context(), k.Server)
		synctest.Wait()
		if len(held) > 0 {
			t.Error("a request in the backend was not waited for")
		}
		close(k.release)
		answered(t, k.reply, "what hung")
		if a := <-held; a.err != nil || len(a.hold.Sessions()) != 5 {
			t.Errorf("%v", a.err)
		} else {
			a.hold.Release()
		}
	})
}

// TestHoldShutdown holds that Shutdown and Close end a hold, and what is to become one.
func TestHoldShutdown(t *testing.T) {
	for name, shut := range map[string]func(*server.Server, context.Context) error{
		"Shutdown": (*server.Server).Shutdown,
		"Close":    func(s *server.Server, _ context.Context) error { return s.Close() },
	} {
		for _, before := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				k := newStuck(t)
				held := try(t.Context(), k.Server)
				if before {
					close(k.release)
					answered(t, k.reply, "what hung")
				}
				synctest.Wait()
				if before != (len(held) > 0) {
					t.Fatalf("held: %v", !before)
				}
				unread := k.Exports[""].Stats().Read.Requests
				if before {
					go k.other.nc.Write(call{op: cmdRead, length: 512}.encode(1))
				}
				over := make(chan error, 1)
				go func() { over <- shut(k.Server, t.Context()) }()
				synctest.Wait()
				a := <-held
				if before {
					checkError(t, a.err, nil)
					if n := len(a.hold.Sessions()); n > 0 {
						t.Errorf("%s: %d clients go along", name, n)
					}
					a.hold.Leave()
				} else {
					checkError(t, a.err, server.ErrServerClosed)
					close(k.release)
					if r, ok := <-k.reply; ok != (name == "Shutdown") || r.errno != 0 {
						t.Errorf("%s: what hung is answered: %v, error %d", name, ok, r.errno)
					}
				}
				checkError(t, <-over, nil)
				checkError(t, k.Shutdown(t.Context()), nil)
				checkError(t, <-k.serving, server.ErrServerClosed)
				io.Copy(io.Discard, k.other.nc)
				if n := k.Exports[""].Stats().Read.Requests; n != unread {
					t.Errorf("%s: what was sent in the hold was executed", name)
				}
			})
		}
	}
	synctest.Test(t, func(t *testing.T) { // A client in the handshake is cut.
		k := newStuck(t)
		defer close(k.release)
		silent := k.dial(t, "-")
		greeted(t, silent)
		held := try(t.Context(), k.Server)
		synctest.Wait()
		k.Close()
		if a := <-held; a.err != server.ErrServerClosed || a.took != 0 {
			t.Errorf("%v after %v", a.err, a.took)
		}
	})
}

// TestHoldDead holds that nobody goes on with clients that have gone, or were cut.
func TestHoldDead(t *testing.T) {
	s := &server.Server{Exports: exports(t)}
	l := listenOn(t, "unix")
	serveOn(t, s, l)
	var conns []*server.Conn
	var clients []*client
	for range 4 {
		ours, theirs := socketpair(t)
		negotiated := make(chan struct{})
		go func() {
			defer close(negotiated)
			greeted(t, ours)
			choose(t, ours, "")
		}()
		session, err := s.Handshake(theirs)
		if err != nil {
			t.Fatal(err)
		}
		<-negotiated
		go s.ServeSession(session)
		c := newClient(t, ours)
		c.expect(0, call{op: cmdRead, length: 512})
		conns, clients = append(conns, session.Conn()), append(clients, c)
	}
	_ = conns[0].Close()
	<-conns[0].Stopped()
	clients[1].start(call{op: cmdDisc})
	<-conns[1].Stopped()
	h := hold(t, s)
	_ = conns[2].Close()
	if held := h.Sessions(); len(held) != 1 || held[0].Conn() != conns[3] {
		t.Errorf("there are %+v", held)
	}
	h.Release()
	clients[3].expect(0, call{op: cmdRead, length: 512})
}

// A mute is a connection over which nothing can be sent any more.
type mute struct {
	net.Conn
	now *atomic.Bool
}

func (c mute) Write(p []byte) (int, error) {
	if c.now.Load() {
		return 0, syscall.EPIPE
	}
	return c.Conn.Write(p)
}

// TestHoldBroken holds that nobody goes on with a client to which a reply could not be sent, and
// which has perhaps got half of it.
func TestHoldBroken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newStuck(t)
		ours, theirs := net.Pipe()
		defer ours.Close()
		var now atomic.Bool
		k.conns <- mute{theirs, &now}
		greeted(t, ours)
		choose(t, ours, "stuck")
		ours.Write(call{op: cmdRead, length: 512}.encode(1))
		synctest.Wait()
		held := try(t.Context(), k.Server)
		synctest.Wait()
		now.Store(true)
		close(k.release)
		a := <-held
		if a.err != nil || len(a.hold.Sessions()) != 2 {
			t.Fatalf("%v, %d clients go along", a.err, len(a.hold.Sessions()))
		}
		a.hold.Release()
	})
}

// TestHoldRace has holds and the end of the server come in any order.
func TestHoldRace(t *testing.T) {
	for i := range 300 {
		s := &server.Server{Exports: make(map[string]*server.Export)}
		for _, name := range []string{"a", "b", "c", "d"} {
			s.Exports[name] = export(t, newDisk(8192), server.Options{})
			_, session := negotiated(t, s, name)
			go s.ServeSession(session)
		}
		held := try(t.Context(), s)
		for range i % 30 {
			runtime.Gosched()
		}
		checkError(t, s.Shutdown(t.Context()), nil)
		if a := <-held; a.err == nil {
			a.hold.Leave()
		} else {
			checkError(t, a.err, server.ErrServerClosed)
		}
		for name, e := range s.Exports {
			if err := e.Sync(t.Context()); err != nil {
				t.Errorf("export %s: %v", name, err)
			}
		}
	}
}

// TestHoldUnserved leaves sessions that nobody has begun to serve.
func TestHoldUnserved(t *testing.T) {
	a := certs.New(t)
	synctest.Test(t, func(t *testing.T) {
		s, next := secureServer(t, a), secureServer(t, a)
		_, plain := negotiated(t, s, "disk")
		ours, theirs := net.Pipe()
		defer ours.Close()
		heard := make(chan error)
		go func() {
			nc := secured(t, ours, trusting(a), "", "")
			converse(t, nc, option(optExportName, ""), "0123456789")
			_, err := nc.Read(make([]byte, 1))
			heard <- err
		}()
		secure, err := s.Handshake(theirs)
		if err != nil {
			t.Fatal(err)
		}
		ahead, far := net.Pipe()
		defer ahead.Close()
		unread := call{op: cmdRead, length: 512}.encode(7)
		if _, err := s.Resume(far, plain.Agreement, unread); err != nil {
			t.Fatal(err)
		}
		foreign := connect(t, s.Exports["disk"])
		synctest.Wait()
		h := hold(t, s)
		held := h.Sessions()
		if len(held) != 2 {
			t.Fatalf("there are %+v", held)
		}
		for _, one := range held {
			if (one.Conn() == plain.Conn()) != (len(one.Unread) == 0) {
				t.Errorf("%d bytes are unread", len(one.Unread))
			}
			if one.Export() != s.Exports["disk"] {
				t.Errorf("export %p", one.Export())
			}
			session, err := next.Resume(one.NetConn(), one.Agreement, one.Unread)
			if err != nil {
				t.Fatal(err)
			}
			go session.Conn().Transmit()
		}
		h.Leave()
		if r, err := readReply(ahead, func(uint64) int { return 512 }); err != nil || r.cookie != 7 || r.errno != 0 {
			t.Errorf("%+v, %v", r, err)
		}
		checkError(t, <-foreign.err, server.ErrShutdown)
		checkError(t, plain.Conn().Transmit(), server.ErrShutdown)
		checkError(t, s.ServeSession(secure), server.ErrShutdown)
		if err := <-heard; err != io.EOF {
			t.Errorf("the client over TLS hears %v", err)
		}
		checkError(t, s.Shutdown(t.Context()), nil)
		next.Close()
	})
}

// TestHoldFile holds that the file of a Unix socket stays with Leave, and not otherwise.
func TestHoldFile(t *testing.T) {
	for _, leave := range []bool{false, true} {
		s := &server.Server{Exports: exports(t)}
		l := listenOn(t, "unix")
		serving := serveOn(t, s, l)
		clientOf(t, l, "")
		if h := hold(t, s); leave {
			h.Leave()
		}
		checkError(t, s.Shutdown(t.Context()), nil)
		checkError(t, <-serving, server.ErrServerClosed)
		if leave { // Serve may well come too late.
			late := listenOn(t, "unix")
			checkError(t, s.Serve(late), server.ErrServerClosed)
			if _, err := os.Stat(late.Addr().String()); err != nil {
				t.Error(err)
			}
		}
		_, err := os.Stat(l.Addr().String())
		if leave != (err == nil) || !leave && !errors.Is(err, syscall.ENOENT) {
			t.Errorf("left: %v, the file: %v", leave, err)
		}
	}
}
