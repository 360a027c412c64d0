package server_test

import (
	"bytes"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// TestHoldLoad has a server stand still again and again while clients are at work and others come
// and go, and then leave them to another one, and that to a third: nobody notices.
func TestHoldLoad(t *testing.T) {
	networks := []string{"tcp", "unix"}
	disk := newDisk(1 << 20)
	newServer := func() *server.Server {
		return &server.Server{Exports: map[string]*server.Export{"x": export(t, disk, server.Options{})}}
	}
	s := newServer()
	var listeners []net.Listener
	for _, network := range networks {
		l := listenOn(t, network)
		listeners = append(listeners, l)
		serveOn(t, s, l)
	}
	var stop atomic.Bool
	var clients, resumes, begun sync.WaitGroup
	begun.Add(16)
	for i := range 8 {
		l := listeners[i%2]
		clients.Go(func() { // One that stays.
			c := newClient(t, clientOf(t, l, "x"))
			begun.Done()
			for round := byte(0); !stop.Load(); round++ {
				off := uint64(i) << 16
				data := bytes.Repeat([]byte{round, byte(i)}, 1<<(round%15))
				c.expect(0, call{op: cmdWrite, offset: off, data: data})
				var reads []<-chan reply
				for range 4 {
					reads = append(reads, c.start(call{op: cmdRead, offset: off, length: uint32(len(data))}))
				}
				for _, ch := range reads {
					if r, ok := <-ch; !ok || !bytes.Equal(r.data, data) {
						t.Errorf("client %d, round %d: served: %v", i, round, ok)
						return
					}
				}
			}
		})
		clients.Go(func() { // Those that come and go.
			for round := 0; !stop.Load(); round++ {
				nc := clientOf(t, l, "x")
				c := newClient(t, nc)
				if round == 0 {
					begun.Done()
				}
				c.expect(0, call{op: cmdRead, length: 4096})
				c.start(call{op: cmdDisc})
				nc.Close()
			}
		})
	}
	begun.Wait()
	for i := range 60 {
		<-time.After(time.Millisecond) // of work
		h := hold(t, s)
		if i%20 != 19 {
			h.Release()
			continue
		}
		next := newServer()
		held := h.Sessions()
		var resumed []*server.Session
		for _, one := range held {
			resumed = append(resumed, resume(t, next, one))
		}
		for i, l := range listeners {
			listeners[i] = copyOf(t, l)
		}
		h.Leave()
		checkError(t, s.Shutdown(t.Context()), nil)
		for _, session := range resumed {
			resumes.Go(func() { _ = next.ServeSession(session) })
		}
		for _, l := range listeners {
			serveOn(t, next, l)
		}
		s = next
	}
	stop.Store(true)
	clients.Wait()
	checkError(t, s.Shutdown(t.Context()), nil)
	resumes.Wait()
}

// TestHoldConnects has clients connect in a hold: they are served afterwards, by the server or by
// the one that goes on. So is one that was accepted, and found no place.
func TestHoldConnects(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		for _, leave := range []bool{false, true} {
			p := newPair(t)
			p.old.MaxConnections = 1
			l := listenOn(t, network)
			copied := copyOf(t, l)
			serveOn(t, p.old, l)
			first := clientOf(t, l, "x")
			second := dialTo(t, l)
			h := hold(t, p.old)
			for len(h.Waiting()) == 0 { // Perhaps it was not accepted before.
				h.Release()
				<-time.After(time.Millisecond)
				h = hold(t, p.old)
			}
			third := dialTo(t, l)
			if leave {
				session, waiting := resume(t, p.next, h.Sessions()[0]), copyConn(t, h.Waiting()[0])
				h.Leave()
				serveOn(t, p.next, copied)
				go p.next.ServeSession(session)
				go func() {
					session, err := p.next.Handshake(waiting)
					if err != nil {
						t.Error(err)
						return
					}
					p.next.ServeSession(session)
				}()
			} else {
				h.Release()
			}
			newClient(t, first).expect(0, call{op: cmdWrite, data: []byte("a")})
			for _, nc := range []net.Conn{second, third} {
				first.Close()
				greeted(t, nc)
				choose(t, nc, "x")
				newClient(t, nc).expect(0, call{op: cmdRead, length: 512})
				first = nc
			}
			first.Close()
			if n := len(p.disk.history()); n != 3 {
				t.Errorf("%s, left: %v: %d requests", network, leave, n)
			}
			checkError(t, p.old.Shutdown(t.Context()), nil)
		}
	}
}

// TestResumeMany has many sessions resumed at once, before anybody is accepted: they are within the
// limits, and counted like others.
func TestResumeMany(t *testing.T) {
	const most, perAddress = 20, 8
	s := &server.Server{Exports: exports(t), MaxConnections: most, MaxPerAddress: perAddress,
		HandshakeTimeout: 50 * time.Millisecond}
	_, session := negotiated(t, s, "")
	agreed := session.Agreement
	session.Conn().Close()
	results := make(chan error, 40)
	var mu sync.Mutex // guards clients and sameAddress
	var clients []net.Conn
	sameAddress := 0
	var served sync.WaitGroup
	for i := range 40 {
		served.Go(func() {
			ours, theirs := socketpair(t)
			var nc net.Conn = theirs
			if i < 20 {
				nc = caller{theirs, &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}}
			}
			session, err := s.Resume(nc, agreed, call{op: cmdRead, length: 512}.encode(uint64(i)))
			if err != nil {
				results <- err
				return
			}
			mu.Lock()
			clients = append(clients, ours)
			if i < 20 {
				sameAddress++
			}
			mu.Unlock()
			results <- nil
			checkError(t, s.ServeSession(session), nil)
		})
	}
	resumed := 0
	for range 40 {
		if err := <-results; err == nil {
			resumed++
		}
	}
	if resumed != most || sameAddress > perAddress {
		t.Errorf("%d sessions, %d of them by one address", resumed, sameAddress)
	}
	l := listenOn(t, "unix")
	serveOn(t, s, l)
	waiting := dialTo(t, l)
	waiting.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := waiting.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one more client is served: %v", err)
	}
	waiting.SetReadDeadline(time.Time{})
	for _, nc := range clients {
		if r, err := readReply(nc, func(uint64) int { return 512 }); err != nil || r.errno != 0 {
			t.Errorf("%+v, %v", r, err)
		}
	}
	clients[0].Close()
	greeted(t, waiting)
	for _, nc := range clients {
		nc.Close()
	}
	served.Wait()
}
