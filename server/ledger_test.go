package server

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"

	"github.com/nbdctl/nbdctl/server/internal/rawio"
)

// A restless connection has nothing to receive until its wait ends, as do.
type restless struct {
	rawio.Conn
	still bool
	end   func(rawio.Lender) (int, error)
}

func (r *restless) Window() int { return 128 << 10 }

func (r *restless) Recv(l rawio.Lender) (int, error) {
	l.Lend()
	if l.Yield(r.still) {
		l.Lend()
	}
	l.Park(r.still)
	return r.end(l)
}

// TestLedgerRest holds when an inbox that waits is at rest, and that it is no more as soon as the
// wait has ended, for whatever reason, and before anything is received.
func TestLedgerRest(t *testing.T) {
	fails := func(err error) func(rawio.Lender) (int, error) {
		return func(rawio.Lender) (int, error) { return 0, err }
	}
	for name, tt := range map[string]struct {
		left     int // bytes of an incomplete request
		restless bool
		end      func(rawio.Lender) (int, error)
		want     uint32 // while it waits
	}{
		"deadline":      {end: fails(os.ErrDeadlineExceeded)},
		"end":           {end: fails(io.EOF)},
		"closed":        {end: fails(net.ErrClosed)},
		"bytes":         {end: func(l rawio.Lender) (int, error) { return copy(l.Lend(), "x"), nil }},
		"of no promise": {end: fails(io.EOF), restless: true, want: 1},
		"a byte left":   {end: fails(io.EOF), left: 1, want: 1},
		"a stub left":   {end: fails(io.EOF), left: maxStub, want: 1},
		"many left":     {end: fails(io.EOF), left: maxStub + 1, want: 1},
	} {
		t.Run(name, func(t *testing.T) {
			var word atomic.Uint32
			word.Store(1)
			var pool buffers
			src := &restless{still: !tt.restless}
			in := newInbox(src, &pool, nil)
			in.ledger = ledger{&word}
			if tt.left > 0 {
				in.putBack(make([]byte, tt.left))
				if err := in.receive(); err != nil {
					t.Fatal(err)
				}
			}
			src.end = func(l rawio.Lender) (int, error) {
				if got := word.Load(); got != tt.want {
					t.Errorf("while it waits the ledger has %d, want %d", got, tt.want)
				}
				l.Park(src.still) // The wait goes on.
				if got := word.Load(); got != tt.want {
					t.Errorf("while it waits on the ledger has %d, want %d", got, tt.want)
				}
				if l.Lend(); word.Load() != 1 {
					t.Errorf("before it receives the ledger has %d, want 1", word.Load())
				}
				l.Park(src.still)
				return tt.end(l)
			}
			in.receive()
			if got := word.Load(); got != 1 {
				t.Errorf("after the wait the ledger has %d, want 1", got)
			}
		})
	}
}

// A mute connection can't send.
type mute struct{ rawio.Conn }

func (mute) Send(*rawio.Vec, bool) (int, error) { return -1, errors.New("mute") }

// TestLedgerBroken holds that a connection on which a reply may have been sent in part never stands
// still again, also when nothing is in flight any more.
func TestLedgerBroken(t *testing.T) {
	var word atomic.Uint32
	c := &Conn{}
	c.SetLedger(&word)
	c.outbox.io = mute{}
	c.outbox.broken = func() {
		if word.Load() < 3 { // the loop, the request, and what is broken
			t.Errorf("when the loop is told the ledger has %d", word.Load())
		}
	}
	r := newRequest()
	r.head = []byte("reply")
	c.flight.add(r)
	c.outbox.sending.Lock()
	c.outbox.vec.Add(r.head)
	c.outbox.send(&c.outbox.vec, false)
	c.outbox.sending.Unlock()
	c.flight.remove(r)
	if got := word.Load(); got != 2 {
		t.Errorf("the ledger has %d, want 2", got)
	}
}

// TestLedgerYield holds that an inbox is at rest while it gives the processor away, if nothing is
// left over, and that it is not before it receives.
func TestLedgerYield(t *testing.T) {
	for _, tt := range []struct {
		left  int
		still bool
		want  uint32
	}{{0, true, 0}, {0, false, 1}, {1, true, 1}} {
		var word atomic.Uint32
		word.Store(1)
		var pool buffers
		src := &restless{still: tt.still}
		in := newInbox(src, &pool, make([]byte, tt.left))
		if tt.left > 0 {
			if err := in.receive(); err != nil {
				t.Fatal(err)
			}
		}
		in.ledger = ledger{&word}
		in.yields.since = 1 // Replies were sent.
		if !in.Yield(tt.still) {
			t.Fatal("it does not yield")
		}
		if got := word.Load(); got != tt.want {
			t.Errorf("%d bytes left, %v: the ledger has %d, want %d", tt.left, tt.still, got, tt.want)
		}
		if in.Lend(); word.Load() != 1 {
			t.Errorf("before it receives the ledger has %d", word.Load())
		}
	}
}
