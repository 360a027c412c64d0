package server

import (
	"net"
	"sync"
	"testing"

	"github.com/nbdctl/nbdctl/server/wire"
)

func newClaims() *claims {
	l := new(claims)
	l.gone.L = &l.mu
	return l
}

// TestClaims holds who waits for whom: only for older claims, of other connections, to some of the same bytes.
func TestClaims(t *testing.T) {
	l, a, b := newClaims(), new(Conn), new(Conn)
	at := func(offset uint64, length uint64) *wire.Request {
		return &wire.Request{Command: wire.CmdWrite, Offset: offset, Length: length}
	}
	var first, second, third claim
	if l.add(&first, a, at(4096, 4096)) {
		t.Error("the first claim of all has to wait")
	}
	tests := []struct {
		name string
		c    *Conn
		h    *wire.Request
		free bool
	}{
		{"the same connection", a, at(4096, 4096), true},
		{"just before", b, at(0, 4096), true},
		{"just behind", b, at(8192, 4096), true},
		{"the same", b, at(4096, 4096), false},
		{"the first byte", b, at(0, 4097), false},
		{"the last byte", b, at(8191, 1), false},
		{"more on both sides", b, at(0, 1<<20), false},
	}
	for _, tt := range tests {
		var k claim
		if l.free(tt.c, tt.h) != tt.free || l.tryAdd(&k, tt.c, tt.h) != tt.free {
			t.Errorf("%s: want free %t", tt.name, tt.free)
		}
		l.remove(&k)
	}
	if !l.add(&second, b, at(0, 8192)) {
		t.Error("the second claim does not wait for the first")
	}
	if !l.add(&third, a, at(0, 512)) {
		t.Error("the third claim does not wait for the second, which waits itself")
	}
	l.remove(&first)
	if err := l.wait(&second); err != nil {
		t.Error(err)
	}
	a.closed.Store(true)
	if err := l.wait(&third); err != errAbandoned {
		t.Errorf("error %v, want errAbandoned", err)
	}
	l.remove(&third)
	l.remove(&third) // again
	l.remove(&second)
	if l.count.Load() != 0 || l.oldest != nil || l.newest != nil || a.claimed != 0 || b.claimed != 0 {
		t.Errorf("claims are left: %d", l.count.Load())
	}
}

// TestClaimsExclude has many goroutines claim ranges of one byte array, which the race detector watches.
func TestClaimsExclude(t *testing.T) {
	l := newClaims()
	var owner [64]*Conn
	var wg sync.WaitGroup
	for g := range 8 {
		c := new(Conn) // one goroutine each: within a connection nothing is excluded
		wg.Go(func() {
			var k claim
			for i := range 2000 {
				first, length := (i*7+g*13)%60, 1+(i+g)%4
				if l.add(&k, c, &wire.Request{Command: wire.CmdTrim, Offset: uint64(first), Length: uint64(length)}) {
					if err := l.wait(&k); err != nil {
						t.Error(err)
					}
				}
				for j := range length {
					owner[first+j] = c
				}
				for j := range length {
					if owner[first+j] != c {
						t.Errorf("byte %d is changed by two at once", first+j)
					}
				}
				l.remove(&k)
			}
		})
	}
	wg.Wait()
}

// BenchmarkClaims is what a plain write on the connection's own goroutine costs more, beside nobody.
func BenchmarkClaims(b *testing.B) {
	l, c := newClaims(), new(Conn)
	var k claim
	h := &wire.Request{Command: wire.CmdWrite, Offset: 4096, Length: 4096}
	b.Run("plain", func(b *testing.B) {
		for b.Loop() {
			l.tryAdd(&k, c, h)
			l.remove(&k)
		}
	})
	b.Run("fast", func(b *testing.B) {
		for b.Loop() {
			l.free(c, h)
		}
	})
}

// TestClaimsHurry holds who is disturbed for who waits: the loop that holds a claim for a payload, and not one whose worker has it.
func TestClaimsHurry(t *testing.T) {
	l := newClaims()
	conn := func() *Conn {
		nc, other := net.Pipe()
		t.Cleanup(func() { nc.Close(); other.Close() })
		return &Conn{nc: nc, phase: phaseServing}
	}
	streams, works, waits := conn(), conn(), conn()
	h := &wire.Request{Command: wire.CmdWrite, Length: 4096}
	var works1, waits1 claim
	l.add(&streams.claim, streams, h)
	l.add(&works1, works, h)
	if !l.add(&waits1, waits, h) {
		t.Error("there is nothing to wait for")
	}
	done := false
	l.hurry(&waits1, &done)
	if streams.fence == nil || works.fence != nil || waits.fence != nil {
		t.Errorf("disturbed: who streams %t, who works %t, who waits %t", streams.fence != nil, works.fence != nil, waits.fence != nil)
	}
}
