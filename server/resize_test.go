package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// TestResize holds that the bounds of requests follow the size, on connections that are there
// already.
func TestResize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := export(t, newDisk(8192), server.Options{BlockSize: 512})
		s := connect(t, e)
		last := call{op: cmdWrite, offset: 7680, data: make([]byte, 512)}
		for _, tt := range []struct {
			size  int64
			errno uint32
		}{{8192, 0}, {4096, enospc}, {7680, enospc}, {8192, 0}, {512, enospc}, {0, enospc}, {8192, 0}} {
			if err := e.Resize(t.Context(), tt.size); err != nil || e.Size() != tt.size {
				t.Errorf("resize to %d: size %d, error %v", tt.size, e.Size(), err)
			}
			s.expect(tt.errno, last)
		}
		for _, size := range []int64{-512, 511, 8704} {
			if err := e.Resize(t.Context(), size); err == nil || e.Size() != 8192 {
				t.Errorf("resize to %d: size %d, error %v", size, e.Size(), err)
			}
		}
		s.disconnect()
		if err := e.Resize(t.Context(), 512); err != nil {
			t.Errorf("with nobody connected: %v", err)
		}
	})
}

// TestShrinkWaits holds that Resize returns after the last request that was let in before, that it
// ends with its context, and that the connections go on in both cases.
func TestShrinkWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(8192)
		var slow atomic.Bool
		d.before = func(op string, _, _ int64) error {
			if slow.Load() {
				time.Sleep(time.Minute)
			}
			return nil
		}
		e := export(t, d, server.Options{})
		idle, s := connect(t, e), connect(t, e)
		write := call{op: cmdWrite, offset: 4096, data: make([]byte, 512)}
		slow.Store(true)
		first := s.start(write)
		synctest.Wait()

		cause := errors.New("no more patience")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(cause) })
		if err := e.Resize(ctx, 4096); !errors.Is(err, cause) || e.Size() != 8192 {
			t.Errorf("size %d, error %v, want the old one and why it was given up", e.Size(), err)
		}
		second := s.start(write) // The loop reads on while the first is still in the backend.
		synctest.Wait()
		if n := e.Stats().InFlight; n != 2 {
			t.Errorf("%d requests in flight after the attempt, want 2", n)
		}

		start := time.Now()
		if err := e.Resize(t.Context(), 4096); err != nil || time.Since(start) < 50*time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		for _, ch := range []<-chan reply{first, second} {
			synctest.Wait()
			select {
			case p := <-ch:
				if p.errno != 0 {
					t.Errorf("a request from before got error %d", p.errno)
				}
			default:
				t.Error("Resize returned before a reply")
			}
		}
		slow.Store(false)
		s.expect(enospc, write)
		for _, c := range []*session{idle, s} {
			c.expect(0, call{op: cmdRead, length: 512})
			c.disconnect()
		}
	})
}

// TestShrinkAnywhere shrinks at every byte of a stream of requests: each is executed or refused
// once, as a whole, and answered.
func TestShrinkAnywhere(t *testing.T) {
	var stream []byte
	calls := []call{
		{op: cmdWrite, offset: 0, data: bytes.Repeat([]byte{1}, 100)},
		{op: cmdWrite, offset: 4096, data: bytes.Repeat([]byte{2}, 100)}, // not there any more, unless it came before
		{op: cmdRead, offset: 0, length: 10},
		{op: cmdWrite, offset: 200, data: bytes.Repeat([]byte{3}, 100)},
	}
	ends := []int{}
	for i, q := range calls {
		stream = append(stream, q.encode(uint64(i))...)
		ends = append(ends, len(stream))
	}
	for cut := range len(stream) + 1 {
		synctest.Test(t, func(t *testing.T) {
			d := newDisk(8192)
			e := export(t, d, server.Options{})
			ours, theirs := net.Pipe()
			defer ours.Close()
			c := e.NewConn(theirs, nil)
			result := make(chan error, 1)
			go func() { result <- c.Transmit() }()
			answers := make(chan reply, 2*len(calls))
			go func() {
				defer close(answers)
				for {
					p, err := readReply(ours, func(cookie uint64) int { return int(calls[cookie].length) })
					if err != nil {
						return // the test is over
					}
					answers <- p
				}
			}()
			ours.Write(stream[:cut])
			synctest.Wait()
			if err := e.Resize(t.Context(), 4096); err != nil {
				t.Errorf("cut at %d: %v", cut, err)
			}
			ours.Write(stream[cut:])
			for range calls {
				p := <-answers
				if late := cut < ends[1]; (p.errno != 0) != (late && p.cookie == 1) {
					t.Errorf("cut at %d: request %d got error %d", cut, p.cookie, p.errno)
				}
			}
			ours.Write(call{op: cmdDisc}.encode(0))
			checkError(t, <-result, nil)
			want := make([]byte, 8192)
			for i, q := range calls {
				if i != 1 || cut >= ends[1] {
					copy(want[q.offset:], q.data)
				}
			}
			if !bytes.Equal(d.data, want) {
				t.Errorf("cut at %d: what is stored is wrong", cut)
			}
		})
	}
}

// TestShrinkInPayload shrinks while the payload of a large write is on its way into the backend's
// own memory.
func TestShrinkInPayload(t *testing.T) {
	const size, n = 4 << 20, 1 << 20
	for _, offset := range []uint64{0, size / 2} { // stays; is cut off
		e := export(t, directDisk{newDisk(size)}, server.Options{})
		s := connectSockets(t, e)
		data := bytes.Repeat([]byte("payload."), n/8)
		whole := call{op: cmdWrite, offset: offset, data: data}.encode(42)
		answer := make(chan reply, 1)
		s.mu.Lock()
		s.waiting[42] = waiter{reply: answer}
		s.mu.Unlock()
		s.nc.Write(whole[:n/2])
		if err := e.Resize(t.Context(), size/2); err != nil {
			t.Fatal(err)
		}
		s.nc.Write(whole[n/2:])
		p := <-answer
		if want := offset > 0; (p.errno == enospc) != want {
			t.Errorf("at %d: error %d", offset, p.errno)
		}
		if offset == 0 {
			if got := s.expect(0, call{op: cmdRead, length: n}); !bytes.Equal(got, data) {
				t.Error("the write that had begun before has not arrived whole")
			}
		}
		s.disconnect()
	}
}

// A guarded disk fails the test when a call reaches beyond a limit that the test moves.
type guarded struct {
	*disk
	limit atomic.Int64
	wrong atomic.Pointer[string]
}

func (g *guarded) see(off, n int64) {
	if limit := g.limit.Load(); off+n > limit {
		s := fmt.Sprintf("%d bytes at %d, beyond %d", n, off, limit)
		g.wrong.Store(&s)
	}
}

// TestResizeUnderLoad moves the end up and down under requests from several connections: whatever
// they ask, no call is under way beyond the end after Resize has returned.
func TestResizeUnderLoad(t *testing.T) {
	const large, small = 1 << 20, 64 << 10
	g := &guarded{disk: newDisk(large)}
	g.limit.Store(large)
	g.before = func(op string, off, n int64) error {
		g.see(off, n)
		if off%3 == 0 {
			<-time.After(50 * time.Microsecond)
		}
		g.see(off, n)
		g.disk.mu.Lock()
		g.calls = nil
		g.disk.mu.Unlock()
		return nil
	}
	e := export(t, g, server.Options{BlockSize: 512})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var served, refused atomic.Int64
	for i := range 3 {
		s := connectSockets(t, e)
		for j := range 4 {
			rng := rand.New(rand.NewPCG(uint64(i), uint64(j)))
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					q := call{op: cmdRead, offset: uint64(rng.IntN(large/512-8)) * 512,
						length: uint32(1+rng.IntN(8)) * 512}
					if rng.IntN(2) == 0 {
						q.op, q.data = cmdWrite, make([]byte, q.length)
					}
					if s.do(q).errno == 0 {
						served.Add(1)
					} else {
						refused.Add(1)
					}
				}
			})
		}
	}
	for range 100 {
		if err := e.Resize(t.Context(), small); err != nil {
			t.Error(err)
		}
		g.limit.Store(small)
		<-time.After(time.Millisecond)
		g.limit.Store(large)
		if err := e.Resize(t.Context(), large); err != nil {
			t.Error(err)
		}
		<-time.After(time.Millisecond)
	}
	close(stop)
	wg.Wait()
	if p := g.wrong.Load(); p != nil {
		t.Error(*p)
	}
	if served.Load() == 0 || refused.Load() == 0 {
		t.Errorf("%d served, %d refused: one half of the test did not take place", served.Load(), refused.Load())
	}
	if last := e.LastError(); last != nil && !strings.Contains(last.Error(), "past the end") {
		t.Error(last)
	}
}
