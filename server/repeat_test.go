package server_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// An obedient disk waits for ever behind 64 KiB, and gives up as soon as its context ends.
type obedient struct {
	plain
	calls *atomic.Int32
}

func (d obedient) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 65536 {
		return d.plain.ReadAt(p, off)
	}
	d.calls.Add(1)
	<-ctx.Done()
	return 0, ctx.Err()
}

// TestContextRepeated holds that a repetition is known although the backend has given up the first
// request at once.
func TestContextRepeated(t *testing.T) {
	d := obedient{plain{newDisk(1 << 20), ^backends.Caps(0)}, new(atomic.Int32)}
	e := export(t, d, server.Options{})
	patience := server.Patience{Resend: time.Second, Total: 3 * time.Second}
	e.SetPatience(patience)
	for start := time.Now(); ; {
		s := connectSockets(t, e)
		select {
		case p := <-s.start(call{op: cmdRead, offset: 65536, length: 512}):
			if took := time.Since(start); p.errno != eio || took > patience.Total+3*time.Second {
				t.Errorf("error %d after %v and %d calls", p.errno, took, d.calls.Load())
			}
			s.nc.Close()
			<-s.err
			return
		case <-time.After(patience.Resend):
			s.nc.Close()
			<-s.conn.Stopped()
			s.conn.Close()
			<-s.err
		}
		if time.Since(start) > 2*patience.Total+3*time.Second {
			t.Fatalf("not answered after %v and %d calls", time.Since(start), d.calls.Load())
		}
	}
}

// TestContextAfterEnd has the client hang up when the loop has ended before, and the backend has
// not.
func TestContextAfterEnd(t *testing.T) {
	for _, disconnects := range []bool{true, false} {
		d := patientDisk{plain{newDisk(1 << 20), ^backends.Caps(0)}, make(chan context.Context), make(chan error, 2)}
		e := export(t, d, server.Options{})
		s := connectSockets(t, e)
		s.start(call{op: cmdRead, offset: 65536, length: 512})
		ctx := <-d.entered
		if disconnects {
			s.start(call{op: cmdDisc})
		} else if err := s.nc.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		within(t, s.conn.Stopped(), "the loop ends")
		s.nc.Close()
		within(t, ctx.Done(), "the client hangs up")
		<-s.err
	}
}

// TestOverdueForgotten holds that nobody takes a request for the repetition of one that has failed:
// that is not repeated.
func TestOverdueForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const at = 65536
		d := newDisk(1 << 20)
		gate := make(chan struct{})
		var slow atomic.Bool
		d.before = func(op string, off, n int64) error {
			switch {
			case op != "write" || off != at:
			case slow.Load():
				time.Sleep(1500 * time.Millisecond)
			default:
				<-gate
			}
			return nil
		}
		k := newKernel(t, export(t, d, server.Options{}))
		q := call{op: cmdWrite, offset: at, data: make([]byte, 4096)}
		if p, _, _ := k.do(q); p.errno != eio {
			t.Errorf("error %d", p.errno)
		}
		k.reconnect() // for another reason
		slow.Store(true)
		close(gate)
		time.Sleep(2 * time.Second)
		for i := range 8 {
			if p, times, took := k.do(q); p.errno != 0 || times != 1 {
				t.Errorf("request %d: error %d after %v, sent %d times", i, p.errno, took, times)
			}
		}
		k.end(func() {})
	})
}

// TestSwapPatience changes both at the same time, for the race detector.
func TestSwapPatience(t *testing.T) {
	d := newDisk(1 << 20)
	e := export(t, d, server.Options{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 2000 {
			e.SetPatience(impatient)
		}
	}()
	for range 200 {
		if err := e.Swap(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	<-done
}
