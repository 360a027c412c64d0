package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// A store is memory with a plain interface, guarded by a lock for the race detector's sake.
type store struct {
	mu   sync.RWMutex // guards data
	data []byte
}

func (s *store) Size() int64 { return int64(len(s.data)) }

func (s *store) ReadAt(p []byte, off int64) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return copy(p, s.data[off:]), nil
}

func (s *store) WriteAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return copy(s.data[off:], p), nil
}

func (s *store) Trim(off, n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.data[off : off+n])
	return nil
}

// A fickle store answers without blocking, each time in another way.
type fickle struct {
	store
	turn atomic.Uint32
}

var errFickle = errors.New("not in the mood")

func (s *fickle) ReadAtTo(w backends.Reply, off int64, n int) error {
	half := n / 2
	switch s.turn.Add(1) % 6 {
	case 0: // by reference
		s.mu.RLock()
		defer s.mu.RUnlock()
		// What is referred to is sent later, when nobody holds the lock; a copy keeps the race
		// detector quiet.
		w.Bytes(bytes.Clone(s.data[off : off+int64(n)]))
	case 1: // copied
		p := w.Buffer(n)
		if p == nil {
			return backends.ErrWouldBlock
		}
		s.ReadAt(p, off)
	case 2: // in two parts, of which the second may have no room
		s.mu.RLock()
		w.Bytes(bytes.Clone(s.data[off : off+int64(half)]))
		s.mu.RUnlock()
		p := w.Buffer(n - half)
		if p == nil {
			return backends.ErrWouldBlock
		}
		s.ReadAt(p, off+int64(half))
	case 3: // by a worker, after having given something
		w.Zeros(half)
		return backends.ErrWouldBlock
	case 4: // too little: the read must fail and nothing of it show
		w.Zeros(n - 1)
	case 5: // too much
		w.Zeros(n)
		w.Bytes([]byte{1})
	}
	return nil
}

func (s *fickle) WriteAtFrom(r backends.Payload, off int64, n int) error {
	// Received without the lock, for the client may keep it waiting.
	p := make([]byte, n)
	switch s.turn.Add(1) % 5 {
	case 0:
		return backends.ErrWouldBlock
	case 1: // refused before anything is taken
		return errFickle
	case 2: // refused in the middle
		if err := r.Into(p[:n/2]); err != nil {
			return err
		}
		s.WriteAt(p[:n/2], off)
		return errFickle
	case 3: // in pieces
		for i := 0; i < n; i += 10000 {
			if err := r.Into(p[i:min(n, i+10000)]); err != nil {
				return err
			}
		}
	case 4:
		if err := r.Into(p); err != nil {
			return err
		}
	}
	s.WriteAt(p, off)
	return nil
}

// A sluggish store takes its time now and then.
type sluggish struct{ store }

func (s *sluggish) pause(off int64) {
	if off>>12%8 == 0 {
		time.Sleep(200 * time.Microsecond)
	}
}

func (s *sluggish) ReadAt(p []byte, off int64) (int, error) {
	s.pause(off)
	return s.store.ReadAt(p, off)
}

func (s *sluggish) WriteAt(p []byte, off int64) (int, error) {
	s.pause(off)
	return s.store.WriteAt(p, off)
}

// A referring store answers by reference to memory that is never written while it is read: the
// oracle's users see to that.
type referring struct{ data []byte }

func (s *referring) Size() int64                              { return int64(len(s.data)) }
func (s *referring) ReadAt(p []byte, off int64) (int, error)  { return copy(p, s.data[off:]), nil }
func (s *referring) WriteAt(p []byte, off int64) (int, error) { return copy(s.data[off:], p), nil }
func (s *referring) Trim(off, n int64) error                  { clear(s.data[off : off+n]); return nil }

func (s *referring) ReadAtTo(w backends.Reply, off int64, n int) error {
	w.Bytes(s.data[off : off+int64(n)])
	return nil
}

func (s *referring) WriteAtFrom(r backends.Payload, off int64, n int) error {
	return r.Into(s.data[off : off+int64(n)])
}

// TestBursts sends bursts of mixed requests up to 1 MiB over four connections at once, to stores of
// all characters, and compares with a model what comes back. Each connection has an area of its
// own, in which the requests of one burst do not overlap, because they are executed in no
// particular order.
func TestBursts(t *testing.T) {
	const (
		connections = 4
		area        = 4 << 20
		size        = connections * area
	)
	rounds := 15
	if raceEnabled {
		rounds = 4
	}
	tests := map[string]struct {
		b     backends.Backend
		fails bool // some requests do, and what they have left is anybody's guess
	}{
		"plain":     {b: &store{data: make([]byte, size)}},
		"sluggish":  {b: &sluggish{store{data: make([]byte, size)}}},
		"referring": {b: &referring{data: make([]byte, size)}},
		"fickle":    {b: &fickle{store: store{data: make([]byte, size)}}, fails: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			e := export(t, tt.b, server.Options{})
			var all sync.WaitGroup
			for i := range connections {
				ours, theirs := socketpair(t)
				conn := e.NewConn(theirs, nil)
				all.Go(func() {
					if err := conn.Transmit(); err != nil {
						t.Errorf("Transmit: %v", err)
					}
				})
				all.Go(func() {
					defer ours.Close()
					o := oracle{
						rng:   rand.New(rand.NewPCG(uint64(i), 5)),
						noise: rand.NewChaCha8([32]byte{byte(i)}),
						base:  uint64(i) * area,
						model: make([]byte, area),
						known: bytes.Repeat([]byte{1}, area),
						fails: tt.fails,
					}
					for range rounds {
						if err := o.burst(ours); err != nil {
							t.Errorf("connection %d: %v", i, err)
							return
						}
					}
				})
			}
			all.Wait()
			st := e.Stats()
			if st.InFlight != 0 || (st.Read.Errors+st.Write.Errors > 0) != tt.fails {
				t.Errorf("stats: %+v", st)
			}
		})
	}
}

// An oracle knows what its area holds, where it can be known.
type oracle struct {
	rng   *rand.Rand
	noise *rand.ChaCha8
	base  uint64
	model []byte
	known []byte // 0 where a failed write leaves room for doubt
	fails bool
}

// burst sends some requests at once and checks the replies.
func (o *oracle) burst(rw io.ReadWriter) error {
	var calls []call
	var stream []byte
	for at := uint64(0); ; {
		n := uint64(1 + o.rng.IntN(8<<10))
		if o.rng.IntN(10) == 0 {
			n = uint64(1 + o.rng.IntN(1<<20))
		}
		if at += uint64(o.rng.IntN(16 << 10)); at+n > uint64(len(o.model)) || len(calls) == 150 {
			break
		}
		q := call{op: cmdRead, offset: o.base + at, length: uint32(n)}
		switch o.rng.IntN(8) {
		case 0, 1, 2:
			q = call{op: cmdWrite, offset: o.base + at, data: make([]byte, n)}
			o.noise.Read(q.data)
		case 3:
			q.op = cmdTrim
		case 4:
			q.op = cmdZero
		}
		stream = append(stream, q.encode(uint64(len(calls)))...)
		calls = append(calls, q)
		at += n
	}
	sent := make(chan error, 1)
	go func() {
		_, err := rw.Write(stream)
		sent <- err
	}()
	for range calls {
		p, err := readReply(rw, func(cookie uint64) int {
			if q := calls[cookie]; q.op == cmdRead {
				return int(q.length)
			}
			return 0
		})
		if err != nil {
			return err
		}
		if err := o.check(calls[p.cookie], p); err != nil {
			return err
		}
	}
	return <-sent
}

func (o *oracle) check(q call, p reply) error {
	lo := q.offset - o.base
	hi := lo + uint64(max(int(q.length), len(q.data)))
	model, known := o.model[lo:hi], o.known[lo:hi]
	if p.errno != 0 {
		if !o.fails || p.errno != eio {
			return fmt.Errorf("op %d at %d: error %d", q.op, q.offset, p.errno)
		}
		if q.op == cmdWrite {
			clear(known)
		}
		return nil
	}
	switch q.op {
	case cmdRead:
		if bytes.Equal(p.data, model) {
			return nil
		}
		for i, b := range p.data {
			if known[i] != 0 && b != model[i] {
				return fmt.Errorf("read of %d bytes at %d: byte %d is %#02x, want %#02x",
					q.length, q.offset, i, b, model[i])
			}
		}
		return nil
	case cmdWrite:
		copy(model, q.data)
	default:
		clear(model)
	}
	if o.fails {
		copy(known, bytes.Repeat([]byte{1}, len(known)))
	}
	return nil
}
