package server_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server"
)

// within fails the test if ch is not closed in time.
func within(t *testing.T, ch <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(10 * time.Second):
		t.Fatalf("%s: nothing happens", what)
	}
}

// TestSealed has a client hang up, which would send everything again over another connection, while
// the loop is kept by the backend or by what is in flight. The next connection need not wait for
// that: nothing is begun on the old one any more.
func TestSealed(t *testing.T) {
	const at = 65536
	for _, tt := range []struct {
		name   string
		direct bool // takes writes without a lock
		warm   bool // answers without workers
		limit  int  // on requests in flight
		sealed bool
	}{
		{"in a call", false, true, 0, true},
		{"at the limit", false, false, 1, true},
		{"at the limit, direct", true, false, 1, true},
		{"in a call, direct", true, true, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDisk(1 << 20)
			d.before = func(string, int64, int64) error { return nil }
			e := character{direct: tt.direct, quick: tt.warm}.serveWith(t, d, server.Options{MaxInFlight: tt.limit})
			e.SetPatience(server.Patience{Resend: time.Hour, Total: 2 * time.Hour})
			var once sync.Once
			entered, release := make(chan struct{}), make(chan struct{})
			d.before = func(op string, off, n int64) error {
				if (op == "trim" || op == "write-from") && off == at {
					once.Do(func() {
						close(entered)
						<-release
					})
				}
				return nil
			}
			first := call{op: cmdTrim, offset: at, length: 4096}
			if tt.direct && tt.warm {
				first = call{op: cmdWrite, offset: at, data: []byte("direct")}
			}
			ours, theirs := socketpair(t)
			old := e.NewConn(theirs, nil)
			result := make(chan error, 1)
			go func() { result <- old.Transmit() }()
			behind := call{op: cmdWrite, offset: 8192, data: []byte("old")}
			ours.Write(append(first.encode(1), behind.encode(2)...))
			within(t, entered, "the backend is called")
			ours.Close()
			if !tt.sealed {
				select {
				case <-old.Stopped():
					t.Error("stopped while a write may land that nobody waits for")
				case <-time.After(500 * time.Millisecond):
				}
				close(release)
				within(t, old.Stopped(), "the loop ends")
				<-result
				return
			}
			within(t, old.Stopped(), "the connection is sealed")
			b := connectSockets(t, e)
			b.expect(0, call{op: cmdWrite, offset: 8192, data: []byte("old")})
			b.expect(0, call{op: cmdWrite, offset: 8192, data: []byte("new")})
			again := b.start(call{op: cmdWrite, offset: at, data: []byte("new")})
			close(release)
			checkError(t, <-result, errAny)
			answered(t, again, "what waited for the old connection")
			for _, off := range []uint64{8192, at} {
				if got := b.expect(0, call{op: cmdRead, offset: off, length: 3}); string(got) != "new" {
					t.Errorf("at %d %q is stored", off, got)
				}
			}
			b.disconnect()
		})
	}
}

// A patientDisk gives up what it is asked when nobody waits any more.
type patientDisk struct {
	plain    // which has zeroes written
	entered  chan context.Context
	finished chan error
}

func (d patientDisk) wait(ctx context.Context, off int64) error {
	if off < 65536 {
		return nil
	}
	d.entered <- ctx
	<-ctx.Done()
	d.finished <- context.Cause(ctx)
	return ctx.Err()
}

func (d patientDisk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.wait(ctx, off); err != nil {
		return 0, err
	}
	return d.plain.ReadAt(p, off)
}

func (d patientDisk) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.wait(ctx, off); err != nil {
		return 0, err
	}
	return d.plain.WriteAt(p, off)
}

// TestContext holds that a backend learns when nobody waits for it any more, on workers and on the
// connection's own goroutine, by whatever end of the connection. Transmit returns then.
func TestContext(t *testing.T) {
	requests := map[string]call{
		"read":        {op: cmdRead, offset: 65536, length: 4096},
		"write":       {op: cmdWrite, offset: 65536, data: []byte("data")},
		"large write": {op: cmdWrite, offset: 65536, data: make([]byte, 1<<20)},
		"zeroes":      {op: cmdZero, offset: 65536, length: 4096},
	}
	ends := map[string]func(*session){
		"hangs up": func(s *session) { s.nc.Close() },
		"Close":    func(s *session) { s.conn.Close() },
	}
	for what, q := range requests {
		for how, end := range ends {
			for _, warmed := range []bool{false, true} {
				d := patientDisk{plain{newDisk(2 << 20), ^backends.Caps(0)}, make(chan context.Context),
					make(chan error, 1)}
				e := export(t, d, server.Options{})
				s := connectSockets(t, e)
				if warmed {
					warm(s.client)
				}
				s.start(q)
				ctx := <-d.entered
				select {
				case <-ctx.Done():
					t.Errorf("%s: the context has ended before", what)
				default:
				}
				if _, ok := ctx.Deadline(); ok {
					t.Errorf("%s: the context has a deadline", what)
				}
				end(s)
				if err := <-d.finished; !errors.Is(err, context.Canceled) {
					t.Errorf("%s, %s: the context ended with %v", what, how, err)
				}
				select {
				case <-s.err:
				case <-time.After(10 * time.Second):
					t.Fatalf("%s, %s: Transmit does not return", what, how)
				}
			}
		}
	}
}

// TestContextOne holds that all calls for a connection get the same context, and that it does not
// end while a client has only stopped to send: that one gets its replies.
func TestContextOne(t *testing.T) {
	d := patientDisk{plain{newDisk(1 << 20), ^backends.Caps(0)}, make(chan context.Context), make(chan error, 2)}
	e := export(t, d, server.Options{})
	s := connectSockets(t, e)
	s.start(call{op: cmdRead, offset: 65536, length: 512})
	first := <-d.entered
	s.start(call{op: cmdWrite, offset: 131072, data: []byte("data")})
	if second := <-d.entered; second != first {
		t.Error("two contexts for one connection")
	}
	other := connectSockets(t, e)
	other.start(call{op: cmdRead, offset: 65536, length: 512})
	third := <-d.entered
	if third == first {
		t.Error("one context for two connections")
	}
	if err := s.nc.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	within(t, s.conn.Stopped(), "the loop ends")
	select {
	case <-first.Done():
		t.Error("given up for a client that waits for its replies")
	case <-time.After(300 * time.Millisecond):
	}
	s.conn.Close()
	<-s.err
	<-d.finished
	<-d.finished
	if third.Err() != nil {
		t.Error("the context of another connection has ended")
	}
	other.conn.Close()
	<-other.err
}
