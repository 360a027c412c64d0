package server_test

import (
	"bytes"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// impatient is how the kernel behaves with a timeout of 3 s and a dead timeout of 10 s.
var impatient = server.Patience{Resend: 3 * time.Second, Total: 20 * time.Second}

// hanging makes every call of that kind that touches the byte at off wait until release is called,
// and counts them.
func hanging(d *disk, kind string, off int64) (calls *atomic.Int32, release func()) {
	calls, gate := new(atomic.Int32), make(chan struct{})
	d.before = func(op string, at, n int64) error {
		if op == kind && at <= off && off < at+n {
			calls.Add(1)
			<-gate
		}
		return nil
	}
	return calls, sync.OnceFunc(func() { close(gate) })
}

// A kernel is a client that sends a request again, over a new connection, whenever that has had its
// timeout.
type kernel struct {
	t       *testing.T
	e       *server.Export
	s       *session
	before  []*session
	timeout time.Duration
}

func newKernel(t *testing.T, e *server.Export) *kernel {
	e.SetPatience(impatient)
	return &kernel{t: t, e: e, s: connect(t, e), timeout: impatient.Resend}
}

// do sends q until it is answered, and returns how often, and how long it took.
func (k *kernel) do(q call) (p reply, times int, took time.Duration) {
	start := time.Now()
	for times = 1; ; times++ {
		answer := k.s.start(q)
		select {
		case p = <-answer:
			return p, times, time.Since(start)
		case <-time.After(k.timeout):
			k.reconnect()
		}
	}
}

// reconnect gives up the connection for another one.
func (k *kernel) reconnect() {
	k.s.conn.Close()
	<-k.s.conn.Stopped()
	k.before = append(k.before, k.s)
	k.s = connect(k.t, k.e)
}

// end releases the backend, and waits until it has let go of every connection.
func (k *kernel) end(release func()) {
	release()
	k.s.disconnect()
	for _, s := range k.before {
		if err := <-s.err; !errors.Is(err, net.ErrClosed) {
			k.t.Errorf("a connection that was given up ended with %v", err)
		}
	}
}

// TestOverdue has the backend never come back from a request: it fails when it was sent again for
// long enough, and not before. Neighbours go on meanwhile, and so does the connection afterwards.
func TestOverdue(t *testing.T) {
	const at = 65536
	for _, tt := range []struct {
		kind string
		q    call
	}{
		{"read", call{op: cmdRead, offset: at, length: 4096}},
		{"read", call{op: cmdRead, offset: at, length: 1 << 20}},
		{"write", call{op: cmdWrite, offset: at, data: make([]byte, 4096)}},
		{"write", call{op: cmdWrite, offset: at, data: make([]byte, 1<<20)}},
		{"write-fua", call{op: cmdWrite, flags: fua, offset: at, data: make([]byte, 4096)}},
		{"trim", call{op: cmdTrim, offset: at, length: 4096}},
		{"zero", call{op: cmdZero, offset: at, length: 4096}},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(4 << 20)
				e := export(t, d, server.Options{})
				k := newKernel(t, e)
				calls, release := hanging(d, tt.kind, at)
				p, times, took := k.do(tt.q)
				if p.errno != eio || took < 13*time.Second || took > 23*time.Second {
					t.Errorf("error %d after %v, sent %d times", p.errno, took, times)
				}
				if n := int(calls.Load()); tt.kind == "read" && n != times || tt.kind != "read" && n != 1 {
					t.Errorf("the backend was called %d times, the request was sent %d times", n, times)
				}
				if last := e.LastError(); last == nil || last.Offset != at || last.Took < 0 {
					t.Errorf("last error %v", last)
				}
				k.s.expect(0, call{op: cmdRead, offset: 4096, length: 4096})
				k.s.expect(0, call{op: cmdWrite, offset: 8192, data: []byte("neighbour")})
				if n := e.Stats().InFlight; n < 1 {
					t.Errorf("%d in flight, with one in the backend", n)
				}
				k.end(release)
				if n := e.Stats().InFlight; n != 0 {
					t.Errorf("%d in flight at the end", n)
				}
			})
		})
	}
}

// TestOverdueSlow has each read take 8 s, longer than the timeout: it fails once it has had its
// time, though the backend answers each time, and always too late.
func TestOverdueSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(1 << 20)
		e := export(t, d, server.Options{})
		k := newKernel(t, e)
		d.before = func(op string, off, n int64) error {
			if off == 65536 {
				time.Sleep(8 * time.Second)
			}
			return nil
		}
		p, times, took := k.do(call{op: cmdRead, offset: 65536, length: 4096})
		if p.errno != eio || took < 13*time.Second || took > 23*time.Second {
			t.Errorf("error %d after %v, sent %d times", p.errno, took, times)
		}
		k.end(func() {})
	})
}

// TestOverduePause has the backend stand still for 8 s, and be quick before and after: nothing
// fails.
func TestOverduePause(t *testing.T) {
	for _, q := range []call{{op: cmdRead, offset: 65536, length: 4},
		{op: cmdWrite, offset: 65536, data: []byte("data")}, {op: cmdFlush}} {
		synctest.Test(t, func(t *testing.T) {
			d := newDisk(1 << 20)
			e := export(t, d, server.Options{})
			k := newKernel(t, e)
			gate := make(chan struct{})
			time.AfterFunc(8*time.Second, func() { close(gate) })
			d.before = func(string, int64, int64) error { <-gate; return nil }
			p, times, took := k.do(q)
			if p.errno != 0 || times != 3 || took < 8*time.Second || took > 9*time.Second {
				t.Errorf("op %d: error %d after %v, sent %d times", q.op, p.errno, took, times)
			}
			// When nothing can come again any more, all is as before.
			time.Sleep(time.Minute)
			k.s.expect(0, q)
			k.end(func() {})
		})
	}
}

// TestOverdueRange has a write fail that the backend is still at work on: what is written there
// later is there in the end, and is not answered before. That holds on the same connection, too.
func TestOverdueRange(t *testing.T) {
	const at = 65536
	for _, warmed := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			old, newer := bytes.Repeat([]byte("o"), 4096), bytes.Repeat([]byte("n"), 4096)
			d := newDisk(1 << 20)
			e := export(t, d, server.Options{})
			k := newKernel(t, e)
			_, release := hanging(d, "write", at)
			if p, _, _ := k.do(call{op: cmdWrite, offset: at, data: old}); p.errno != eio {
				t.Errorf("error %d", p.errno)
			}
			if warmed {
				// The failure is long ago, and the loop makes plain calls again.
				time.Sleep(time.Hour)
				warm(k.s.client)
			}
			later := k.s.start(call{op: cmdWrite, offset: at + 512, data: newer[512:]})
			k.s.expect(0, call{op: cmdWrite, offset: at + 4096, data: newer}) // a neighbour
			time.Sleep(time.Second)
			unanswered(t, later, "a write to a range that may still change")
			release()
			answered(t, later, "a write to that range")
			got := k.s.expect(0, call{op: cmdRead, offset: at, length: 8192})
			want := bytes.Join([][]byte{old[:512], newer[512:], newer}, nil)
			if !bytes.Equal(got, want) {
				t.Error("other bytes than were written last")
			}
			k.end(release)
		})
	}
}

// TestOverdueSuspect holds that what overlaps a request that the backend never came back from fails
// before it costs the connection.
func TestOverdueSuspect(t *testing.T) {
	const at = 65536
	for _, kind := range []string{"read", "write"} {
		synctest.Test(t, func(t *testing.T) {
			d := newDisk(1 << 20)
			e := export(t, d, server.Options{})
			k := newKernel(t, e)
			_, release := hanging(d, kind, at)
			ask := func(off uint64, n int) call {
				if kind == "read" {
					return call{op: cmdRead, offset: off, length: uint32(n)}
				}
				return call{op: cmdWrite, offset: off, data: make([]byte, n)}
			}
			k.do(ask(at, 4096))
			before := len(k.before)
			for range 5 {
				if p, times, took := k.do(ask(at-4096, 8192)); p.errno != eio || times != 1 || took > k.timeout {
					t.Errorf("%s: error %d after %v, sent %d times", kind, p.errno, took, times)
				}
			}
			if len(k.before) != before {
				t.Errorf("%s: it cost %d connections", kind, len(k.before)-before)
			}
			k.end(release)
		})
	}
}

// TestOverdueBound has the backend hang in everything, for a client that always has more to ask:
// all fails in time, and the backend has no more of it than two connections may have in flight.
func TestOverdueBound(t *testing.T) {
	const depth = 16
	d := newDisk(1 << 20)
	e := export(t, d, server.Options{MaxInFlight: depth})
	patience := server.Patience{Resend: 400 * time.Millisecond, Total: 1500 * time.Millisecond}
	e.SetPatience(patience)
	gate, calls, most := make(chan struct{}), atomic.Int32{}, atomic.Int32{}
	d.before = func(string, int64, int64) error {
		n := calls.Add(1)
		defer calls.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-gate
		return nil
	}
	type pending struct {
		off    uint64
		since  time.Time
		answer <-chan reply
	}
	var all []pending
	var sessions []*session
	s, next, failed := connectSockets(t, e), uint64(0), 0
	for start := time.Now(); time.Since(start) < 6*time.Second; {
		for len(all) < depth {
			q := call{op: cmdRead, offset: next * 512, length: 512}
			all, next = append(all, pending{q.offset, time.Now(), s.start(q)}), next+1
		}
		<-time.After(patience.Resend)
		left := all[:0]
		for _, p := range all {
			select {
			case r, ok := <-p.answer:
				if !ok || r.errno != eio {
					t.Errorf("read at %d: reply %v, error %d", p.off, ok, r.errno)
				}
				failed++
			default:
				left = append(left, p)
				if d := time.Since(p.since); d > patience.Total+3*time.Second {
					t.Fatalf("the read at %d is not answered after %v", p.off, d)
				}
			}
		}
		if all = left; len(all) == 0 {
			continue
		}
		s.nc.Close() // as a client does that has lost its patience
		<-s.conn.Stopped()
		sessions = append(sessions, s)
		s = connectSockets(t, e)
		for i, p := range all {
			all[i].answer = s.start(call{op: cmdRead, offset: p.off, length: 512})
		}
	}
	if failed < 2*depth || most.Load() > 2*depth {
		t.Errorf("%d have failed, at most %d were in the backend at once", failed, most.Load())
	}
	s.nc.Close()
	close(gate)
	for _, s := range append(sessions, s) {
		<-s.err
	}
}
