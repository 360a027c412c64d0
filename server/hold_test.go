package server_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// TestHoldRelease holds connections at every byte of a stream of requests: nothing is executed
// meanwhile, and they go on as if nothing had been.
func TestHoldRelease(t *testing.T) {
	calls := script()
	stream, _ := encodeScript(calls)
	for cut := range len(stream) + 1 {
		synctest.Test(t, func(t *testing.T) {
			d := newDisk(8192)
			e := export(t, d, server.Options{})
			ours, theirs := net.Pipe()
			defer ours.Close()
			go io.Copy(io.Discard, ours)
			conn := e.NewConn(theirs, nil)
			result := make(chan error, 1)
			go func() { result <- conn.Transmit() }()
			other := connect(t, e)
			ours.Write(stream[:cut])
			synctest.Wait()
			h, err := e.Hold(t.Context(), true)
			if err != nil {
				t.Fatal(err)
			}
			before := d.history()
			if n := len(before); n == 0 || before[n-1] != "sync 0+0" {
				t.Errorf("cut at %d: calls of the backend %q, want a sync at the end", cut, before)
			}
			held := later(other, call{op: cmdRead, offset: 7680, length: 512})
			go ours.Write(stream[cut:])
			synctest.Wait()
			if begun := d.history(); len(begun) > 0 {
				t.Errorf("cut at %d: calls of the backend in the hold: %q", cut, begun)
			}
			h.Release()
			h.Release()
			h.Leave() // comes too late
			if p := <-held; p.errno != 0 {
				t.Errorf("cut at %d: error %d", cut, p.errno)
			}
			synctest.Wait()
			conn.Close()
			checkError(t, <-result, net.ErrClosed)
			other.disconnect()
			if n := total(e.Stats()); n != len(calls)+1 {
				t.Errorf("cut at %d: %d requests were answered, want %d", cut, n, len(calls)+1)
			}
		})
	}
}

// later makes a request that nobody may take yet.
func later(s *session, q call) <-chan reply {
	got := make(chan reply, 1)
	go func() { got <- s.do(q) }()
	return got
}

// TestHoldWaits holds that a Hold waits for what is in flight, on connections that have died, too,
// and that one which is given up leaves no trace.
func TestHoldWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(8192)
		release := make(chan struct{})
		d.before = func(op string, off, _ int64) error {
			if op == "write" {
				<-release
			}
			return nil
		}
		e := export(t, d, server.Options{})
		s, dead := connect(t, e), connect(t, e)
		writing := dead.start(call{op: cmdWrite, data: []byte("a")})
		synctest.Wait()
		dead.nc.Close()
		<-writing
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := e.Hold(ctx, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("beside a stuck write: %v", err)
		}
		s.expect(0, call{op: cmdRead, length: 512})
		close(release)
		h, err := e.Hold(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := h.Unread(dead.conn); ok {
			t.Error("somebody can go on with a dead connection")
		}
		if unread, ok := h.Unread(s.conn); !ok || len(unread) > 0 {
			t.Errorf("%d bytes unread, %v", len(unread), ok)
		}
		late := connect(t, e) // begins in the hold
		got := later(late, call{op: cmdRead, length: 512})
		synctest.Wait()
		if st := late.conn.Stats(); st.Read.Requests != 0 {
			t.Error("a connection that began in the hold is served")
		}
		h.Release()
		if p := <-got; p.errno != 0 {
			t.Errorf("error %d", p.errno)
		}
	})
}

// TestHoldSync holds that a Hold ends with a sync that fails, which is a loss.
func TestHoldSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(8192)
		boom := errors.New("boom")
		d.before = func(op string, _, _ int64) error {
			if op == "sync" {
				return boom
			}
			return nil
		}
		e := export(t, d, server.Options{})
		s := connect(t, e)
		if _, err := e.Hold(t.Context(), true); !errors.Is(err, boom) {
			t.Errorf("a sync that fails: %v", err)
		}
		if !errors.Is(e.Loss(), boom) {
			t.Errorf("the loss is %v", e.Loss())
		}
		s.expect(0, call{op: cmdRead, length: 512})
		h, err := e.Hold(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, again := e.Hold(short, false)
		for name, err := range map[string]error{"Hold": again, "Sync": e.Sync(short), "Resize": e.Resize(short, 4096)} {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s in a hold: %v", name, err)
			}
		}
		resized := make(chan error, 1)
		go func() { resized <- e.Resize(t.Context(), 4096) }()
		h.Leave()
		checkError(t, <-s.err, server.ErrShutdown)
		if err := <-resized; err != nil {
			t.Error(err)
		}
	})
}

// TestHoldEarlierSync holds that a sync which was given up is waited for: nothing is in the backend
// in a hold.
func TestHoldEarlierSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(8192)
		d.before = func(op string, _, _ int64) error {
			if op == "sync" {
				time.Sleep(time.Minute)
			}
			return nil
		}
		e := export(t, d, server.Options{})
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		checkError(t, e.Sync(short), context.DeadlineExceeded)
		short, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := e.Hold(short, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("beside a sync: %v", err)
		}
		start := time.Now()
		h, err := e.Hold(t.Context(), false)
		if err != nil || time.Since(start) != 58*time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		h.Release()
	})
}

// TestHoldLeaveEarly leaves connections that have not begun: what was received before is handed on,
// and they never begin, whether they were asked for or not.
func TestHoldLeaveEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(8192)
		e := export(t, d, server.Options{})
		ours, theirs := net.Pipe()
		defer ours.Close()
		asked := e.NewConn(theirs, call{op: cmdRead, length: 512}.encode(1))
		h, err := e.Hold(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		if unread, ok := h.Unread(asked); !ok || len(unread) != 28 {
			t.Errorf("%d bytes unread, %v", len(unread), ok)
		}
		late := connect(t, e)
		synctest.Wait()
		h.Leave()
		checkError(t, <-late.err, server.ErrShutdown)
		checkError(t, asked.Transmit(), server.ErrShutdown)
		if calls := d.history(); len(calls) > 0 {
			t.Errorf("calls of the backend: %q", calls)
		}
		again := connect(t, e)
		again.expect(0, call{op: cmdRead, length: 512})
		again.disconnect()
	})
}
