package server_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// hangOnce makes the first call that changes the byte at off wait until release is called.
func hangOnce(d *disk, off int64) (release func()) {
	var once atomic.Bool
	gate := make(chan struct{})
	d.before = func(op string, at, n int64) error {
		if op != "read" && op != "sync" && at <= off && off < at+n && !once.Swap(true) {
			<-gate
		}
		return nil
	}
	return sync.OnceFunc(func() { close(gate) })
}

// unanswered fails the test if there is a reply.
func unanswered(t *testing.T, ch <-chan reply, what string) {
	t.Helper()
	select {
	case p := <-ch:
		t.Errorf("%s was answered: %+v", what, p)
	default:
	}
}

// answered checks that a reply comes, and that it is no error.
func answered(t *testing.T, ch <-chan reply, what string) {
	t.Helper()
	if p, ok := <-ch; !ok || p.errno != 0 {
		t.Errorf("%s: reply %t, error %d", what, ok, p.errno)
	}
}

// TestStaleWrite has the backend hang in a request that is sent again over another connection,
// after which newer data are written: they must be there in the end, whichever way the requests
// take. Other requests are not delayed.
func TestStaleWrite(t *testing.T) {
	const size, at = 4 << 20, 8192
	old, newer := bytes.Repeat([]byte("o"), 4096), bytes.Repeat([]byte("n"), 4096)
	large := bytes.Repeat([]byte("o"), 2<<20)
	all := backends.CapWrite | backends.CapSync | backends.CapTrim
	plainly := func(d *disk) backends.Backend { return plain{d, all} }
	directly := func(d *disk) backends.Backend { return directDisk{d} }
	tests := []struct {
		name  string
		b     func(d *disk) backends.Backend
		warm  bool // first executed on the connections' own goroutines
		first call
		again call
	}{
		{"write", plainly, false, call{op: cmdWrite, offset: at, data: old}, call{op: cmdWrite, offset: at, data: old}},
		{"write, without workers", plainly, true, call{op: cmdWrite, offset: at, data: old},
			call{op: cmdWrite, offset: at, data: old}},
		{"write FUA", plainly, false, call{op: cmdWrite, flags: fua, offset: at, data: old},
			call{op: cmdWrite, flags: fua, offset: at, data: old}},
		{"large write", plainly, true, call{op: cmdWrite, data: large}, call{op: cmdWrite, data: large}},
		{"trim", plainly, true, call{op: cmdTrim, offset: at, length: 4096},
			call{op: cmdTrim, offset: at, length: 4096}},
		{"zeroes, written", plainly, true, call{op: cmdZero, length: 1 << 20}, call{op: cmdZero, length: 1 << 20}},
		{"direct FUA, then not", directly, false, call{op: cmdWrite, flags: fua, offset: at, data: old},
			call{op: cmdWrite, offset: at, data: old}},
		{"direct trim, then a part", directly, true, call{op: cmdTrim, length: 1 << 20},
			call{op: cmdWrite, offset: at + 512, data: old[:512]}},
		{"direct large write", directly, false, call{op: cmdZero, length: 1 << 20}, call{op: cmdWrite, data: large}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(size)
				e := export(t, tt.b(d), server.Options{})
				a, b := connect(t, e), connect(t, e)
				if tt.warm {
					warm(a.client)
				}
				release := hangOnce(d, at)
				defer release()
				first := a.start(tt.first)
				synctest.Wait()
				again := b.start(tt.again)
				synctest.Wait()
				unanswered(t, again, "the repetition")

				b.expect(0, call{op: cmdRead, offset: at, length: 4096})
				b.expect(0, call{op: cmdWrite, offset: size - 4096, data: newer})
				b.expect(0, call{op: cmdTrim, offset: size - 4096, length: 4096})
				b.expect(0, call{op: cmdFlush})
				unanswered(t, again, "the repetition")

				release()
				answered(t, again, "the repetition")
				b.expect(0, call{op: cmdWrite, offset: at, data: newer})
				answered(t, first, "the first")
				if got := b.expect(0, call{op: cmdRead, offset: at, length: 4096}); !bytes.Equal(got, newer) {
					t.Errorf("%q… is stored", got[:4])
				}
				a.disconnect()
				b.disconnect()
			})
		})
	}
}

// TestStaleStream has a large write stand in the middle, of which the backend has the beginning: to
// the repetition it counts as a whole, until its connection ends.
func TestStaleStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(1 << 20)
		e := export(t, directDisk{d}, server.Options{})
		ours, theirs := net.Pipe()
		half := e.NewConn(theirs, nil)
		result := make(chan error, 1)
		go func() { result <- half.Transmit() }()
		q := call{op: cmdWrite, data: bytes.Repeat([]byte("o"), 512<<10)}
		ours.Write(q.encode(1)[:300<<10])

		b := connect(t, e)
		last := call{op: cmdWrite, offset: 511 << 10, data: bytes.Repeat([]byte("n"), 1024)}
		again := b.start(last)
		b.expect(0, call{op: cmdWrite, offset: 512 << 10, data: last.data})
		synctest.Wait()
		unanswered(t, again, "what overlaps the end")
		ours.Close()
		checkError(t, <-result, errAny)
		answered(t, again, "what overlaps the end")
		b.disconnect()
		half.Close()
	})
}

// TestStaleStreamHurried has a client keep the rest of a large write to itself: another one waits
// for the same bytes, but not for ever, and the write is executed whenever it comes.
func TestStaleStreamHurried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(1 << 20)
		e := export(t, directDisk{d}, server.Options{})
		ours, theirs := net.Pipe()
		s := &session{conn: e.NewConn(theirs, nil)}
		s.run(t)
		q := call{op: cmdWrite, data: bytes.Repeat([]byte("o"), 512<<10)}
		stream := q.encode(1)
		ours.Write(stream[:300<<10])

		b := connect(t, e)
		for range 3 { // the later ones at once
			begin := time.Now()
			b.expect(0, call{op: cmdWrite, offset: 511 << 10, data: bytes.Repeat([]byte("n"), 1024)})
			b.expect(0, call{op: cmdTrim, length: 1 << 20})
			if took := time.Since(begin); took > 2*time.Second {
				t.Errorf("it took %v", took)
			}
		}
		shrink := make(chan error, 1)
		go func() { shrink <- e.Resize(t.Context(), 768<<10) }()
		checkError(t, <-shrink, nil)
		ours.Write(stream[300<<10:])
		if _, err := io.ReadFull(ours, make([]byte, 16)); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(d.data[:512<<10], q.data) {
			t.Error("the write that came in two halves is not there")
		}
		// The loop that has answered counts as a request in flight until it waits for the next
		// one.
		synctest.Wait()
		if st := s.conn.Stats(); st.Write.Requests != 1 || st.Write.Errors != 0 || st.InFlight != 0 {
			t.Errorf("%+v", st)
		}
		b.disconnect()
	})
}

// TestWaitingEnds holds that a connection whose write waits for one of another connection can be
// closed and shut down, that it does not keep the export from shrinking for longer than that, and
// that what is given up is not executed.
func TestWaitingEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(1 << 20)
		e := export(t, d, server.Options{})
		a, b, c := connect(t, e), connect(t, e), connect(t, e)
		release := hangOnce(d, 0)
		defer release()
		q := call{op: cmdWrite, data: []byte("old")}
		first := a.start(q)
		synctest.Wait()
		b.start(q)
		third := c.start(call{op: cmdWrite, data: []byte("new")})
		synctest.Wait()
		b.conn.Close()
		checkError(t, <-b.err, net.ErrClosed)
		unanswered(t, third, "the third")

		shut := make(chan error, 2)
		go func() { shut <- c.conn.Shutdown(t.Context()) }()
		go func() { shut <- e.Resize(t.Context(), 4096) }()
		synctest.Wait()
		if len(shut) != 0 {
			t.Errorf("shutdown or resize has returned while a request waits: %v", <-shut)
		}
		release()
		checkError(t, <-shut, nil)
		checkError(t, <-shut, nil)
		checkError(t, <-c.err, server.ErrShutdown)
		answered(t, first, "the first")
		answered(t, third, "the third")
		if n := len(d.history()); n != 2 || string(d.data[:3]) != "new" {
			t.Errorf("%d calls of the backend, %q is stored", n, d.data[:3])
		}
		a.disconnect()
	})
}

// TestStaleOracle has clients do as Linux does, with a backend that hangs now and then: a write
// that takes too long costs its connection, and is sent again over another one, until it is
// answered. In the end, each block must have what was answered last.
func TestStaleOracle(t *testing.T) {
	for _, quick := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			const blocks, block, rounds, connections, timeout = 12, 4096, 60, 4, time.Second
			d := newDisk(blocks * block)
			var hung atomic.Int32
			e := export(t, plain{d, backends.CapWrite | backends.CapTrim}, server.Options{})
			if quick {
				c := connect(t, e)
				warm(c.client)
				c.disconnect()
			}
			d.before = func(op string, off, n int64) error {
				if rand.IntN(20) == 0 {
					hung.Add(1)
					time.Sleep(time.Duration(rand.Int64N(int64(3 * timeout))))
				}
				return nil
			}
			var mu sync.Mutex // guards lines
			lines := make([]*session, connections)
			ended := make(chan error, 10000)
			dial := func() *session {
				ours, theirs := net.Pipe()
				s := &session{client: newClient(t, ours), conn: e.NewConn(theirs, nil)}
				go func() { ended <- s.conn.Transmit() }()
				return s
			}
			dialled := connections
			for i := range lines {
				lines[i] = dial()
			}
			// try sends q over a connection, and reports whether it was answered in time.
			try := func(q call) bool {
				i := rand.IntN(connections)
				mu.Lock()
				s := lines[i]
				mu.Unlock()
				result := make(chan bool, 1)
				go func() { p, ok := <-s.start(q); result <- ok && p.errno == 0 }()
				timer := time.NewTimer(timeout)
				defer timer.Stop()
				select {
				case ok := <-result:
					if ok {
						return true
					}
				case <-timer.C:
				}
				s.nc.Close()
				mu.Lock()
				defer mu.Unlock()
				if lines[i] == s {
					lines[i] = dial()
					dialled++
				}
				return false
			}
			var wg sync.WaitGroup
			want := make([]byte, blocks)
			for u := range blocks {
				wg.Go(func() {
					for round := range rounds {
						q := call{op: cmdWrite, offset: uint64(u * block),
							data: bytes.Repeat([]byte{byte(round + 1)}, block)}
						want[u] = byte(round + 1)
						if round%7 == 6 {
							q = call{op: cmdTrim, offset: uint64(u * block), length: block}
							want[u] = 0
						}
						for !try(q) {
						}
					}
				})
			}
			wg.Wait()
			for _, s := range lines {
				s.nc.Close()
			}
			for range dialled {
				<-ended
			}
			for u, b := range want {
				if got := d.data[u*block : (u+1)*block]; !bytes.Equal(got, bytes.Repeat([]byte{b}, block)) {
					t.Errorf("block %d has %d … %d, want %d", u, got[0], got[block-1], b)
				}
			}
			t.Logf("%d calls hung, %d connections", hung.Load(), dialled)
		})
	}
}
