package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/server"
)

// kept is a session whose connection keeps a ledger.
type kept struct {
	*session
	word atomic.Uint32
}

// keep serves e over a pair of sockets, with a ledger, to a client that is not there yet.
func keep(t *testing.T, e *server.Export) (k *kept, ours *net.UnixConn) {
	ours, theirs := socketpair(t)
	return keepOn(t, e, theirs), ours
}

func keepOn(t *testing.T, e *server.Export, theirs *net.UnixConn) (k *kept) {
	k = &kept{session: &session{conn: e.NewConn(theirs, nil)}}
	k.word.Store(7)
	k.conn.SetLedger(&k.word)
	if got := k.word.Load(); got != 1 {
		t.Errorf("before it is served the ledger has %d, want 1", got)
	}
	k.run(t)
	return k
}

// queued returns how many bytes there are to be received from a socket.
func queued(t *testing.T, c *net.UnixConn) (n int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		failed := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
		err = errors.Join(err, failed)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// settles waits until the ledger has that, and goes on having it.
func (k *kept) settles(t *testing.T, want uint32, what string) {
	t.Helper()
	settles(t, &k.word, want, what)
}

func settles(t *testing.T, word *atomic.Uint32, want uint32, what string) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); word.Load() != want; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("%s: the ledger has %d, want %d", what, word.Load(), want)
		}
	}
	for range 5 {
		if <-tick.C; word.Load() != want {
			t.Errorf("%s: the ledger has %d, and had %d", what, word.Load(), want)
		}
	}
}

// TestLedger follows a connection through its life.
func TestLedger(t *testing.T) {
	for _, character := range characters {
		t.Run(character.name, func(t *testing.T) {
			d := newDisk(8192)
			e := character.export(t, d)
			k, ours := keep(t, e)
			k.client = newClient(t, ours)
			k.settles(t, 0, "at the beginning")
			for range 3 {
				k.expect(0, call{op: cmdWrite, offset: 512, data: bytes.Repeat([]byte("x"), 512)})
				k.expect(0, call{op: cmdRead, offset: 512, length: 512})
				k.expect(0, call{op: cmdFlush})
				k.expect(enospc, call{op: cmdWrite, offset: 8192, data: []byte("x")})
				k.settles(t, 0, "when all is answered")
			}

			h, err := e.Hold(t.Context(), false)
			if err != nil {
				t.Fatal(err)
			}
			k.settles(t, 1, "in a hold")
			h.Release()
			k.settles(t, 0, "after the hold")
			if h, err = e.Hold(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			h.Leave()
			<-k.err
			k.settles(t, 1, "when it has been left")
		})
	}
}

// TestLedgerEnds holds that a connection that has ended does not stand still, in whatever way that
// came.
func TestLedgerEnds(t *testing.T) {
	for name, end := range map[string]func(k *kept, ours *net.UnixConn){
		"end of the stream": func(_ *kept, ours *net.UnixConn) { ours.CloseWrite() },
		"client closed":     func(_ *kept, ours *net.UnixConn) { ours.Close() },
		"disconnect":        func(_ *kept, ours *net.UnixConn) { ours.Write(call{op: cmdDisc}.encode(0)) },
		"shutdown":          func(k *kept, _ *net.UnixConn) { k.conn.Shutdown(t.Context()) },
		"close":             func(k *kept, _ *net.UnixConn) { k.conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			k, ours := keep(t, export(t, newDisk(512), server.Options{}))
			k.settles(t, 0, "idle")
			end(k, ours)
			<-k.err
			if got := k.word.Load(); got != 1 {
				t.Errorf("the ledger has %d, want 1", got)
			}
		})
	}
}

// TestLedgerIncomplete holds that a connection does not stand still in the middle of a request,
// wherever that is cut.
func TestLedgerIncomplete(t *testing.T) {
	for _, character := range characters {
		for _, n := range []int{1, 100, 100 << 10} { // bytes to be written
			request := call{op: cmdWrite, data: make([]byte, n)}.encode(1)
			for _, cut := range []int{1, 27, 28, len(request) - 1} {
				t.Run(fmt.Sprint(character.name, " ", n, " at ", cut), func(t *testing.T) {
					k, ours := keep(t, character.export(t, newDisk(128<<10)))
					k.settles(t, 0, "idle")
					if _, err := ours.Write(request[:cut]); err != nil {
						t.Fatal(err)
					}
					k.settles(t, 1, "in the middle of a request")
					if _, err := ours.Write(request[cut:]); err != nil {
						t.Fatal(err)
					}
					if _, err := readReply(ours, func(uint64) int { return 0 }); err != nil {
						t.Fatal(err)
					}
					k.settles(t, 0, "behind it")
				})
			}
		}
	}
}

// TestLedgerBusy holds that each request that the backend is at counts, while the loop waits for
// more.
func TestLedgerBusy(t *testing.T) {
	d := newDisk(8192)
	inside, release := make(chan struct{}), make(chan struct{})
	d.before = func(string, int64, int64) error {
		inside <- struct{}{}
		<-release
		return nil
	}
	k, ours := keep(t, export(t, d, server.Options{}))
	k.client = newClient(t, ours)
	var replies []<-chan reply
	for i := range uint32(3) {
		replies = append(replies, k.start(call{op: cmdRead, offset: uint64(i) * 512, length: 512}))
		<-inside
		k.settles(t, i+1, "with the backend at work")
	}
	for left := uint32(2); len(replies) > 0; left-- {
		release <- struct{}{}
		var p reply
		select {
		case p = <-replies[0]:
			replies = replies[1:]
		case p = <-replies[len(replies)-1]:
			replies = replies[:len(replies)-1]
		case p = <-replies[len(replies)/2]:
			replies = append(replies[:len(replies)/2], replies[len(replies)/2+1:]...)
		}
		if p.errno != 0 {
			t.Errorf("error %d", p.errno)
		}
		k.settles(t, left, "with less in the backend")
	}
}

// TestLedgerFull holds that a connection does not stand still before the client has taken so much
// that all replies are in the socket.
func TestLedgerFull(t *testing.T) {
	for _, character := range characters {
		t.Run(character.name, func(t *testing.T) {
			const length, n = 1 << 20, 8
			ours, theirs := socketpair(t)
			k := keepOn(t, character.export(t, newDisk(length)), theirs)
			k.settles(t, 0, "idle")
			for i := range n {
				if _, err := ours.Write(call{op: cmdRead, length: length}.encode(uint64(i))); err != nil {
					t.Fatal(err)
				}
			}
			left, p, full := n*(16+length), make([]byte, 16<<10), 0
			for left > 0 {
				// In this order: when it has received all, it stands still only once all is queued.
				received := queued(t, theirs) == 0
				still := k.word.Load() == 0
				there := queued(t, ours)
				if received && still && there < left {
					t.Fatalf("it stands still with %d bytes queued of %d", there, left)
				}
				if there < left {
					full++
				}
				got, err := ours.Read(p)
				if err != nil {
					t.Fatal(err)
				}
				left -= got
			}
			if full == 0 {
				t.Error("the socket was never full")
			}
			k.settles(t, 0, "when all is taken")
		})
	}
}

// TestLedgerPipe holds that a connection of which it can't be known never stands still.
func TestLedgerPipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		conn := export(t, newDisk(512), server.Options{}).NewConn(theirs, nil)
		var word atomic.Uint32
		conn.SetLedger(&word)
		s := (&session{client: newClient(t, ours), conn: conn}).run(t)
		s.expect(0, call{op: cmdRead, length: 512})
		synctest.Wait()
		if got := word.Load(); got != 1 {
			t.Errorf("the ledger has %d, want 1", got)
		}
		s.disconnect()
	})
}
