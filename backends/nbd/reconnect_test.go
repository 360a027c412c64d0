package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server"
)

// A restarter is a server that can go away and come back. What it has outlives it.
type restarter struct {
	t       testing.TB
	path    string
	name    string
	export  *server.Export
	server  *server.Server
	running chan error
}

func newRestarter(t testing.TB, b backends.Backend) *restarter {
	t.Helper()
	r := &restarter{t: t, path: filepath.Join(t.TempDir(), "s"), name: "disk"}
	r.offer(b, server.Options{})
	r.start()
	t.Cleanup(r.stop)
	return r
}

func (r *restarter) offer(b backends.Backend, o server.Options) {
	r.t.Helper()
	var err error
	if r.export, err = server.NewExport(b, o); err != nil {
		r.t.Fatal(err)
	}
}

func (r *restarter) uri() nbd.URI { return nbd.URI{Network: "unix", Address: r.path, Export: "disk"} }

func (r *restarter) start() {
	l, err := net.Listen("unix", r.path)
	if err != nil {
		r.t.Fatal(err)
	}
	s := &server.Server{Exports: map[string]*server.Export{r.name: r.export}}
	r.server, r.running = s, make(chan error, 1)
	go func() { r.running <- s.Serve(l) }()
}

// stop cuts all connections.
func (r *restarter) stop() {
	if r.server == nil {
		return
	}
	r.server.Close()
	<-r.running
	r.server = nil
}

// quick has connections replaced without pauses that matter.
func quick() *nbd.Reconnect {
	return &nbd.Reconnect{MinPause: time.Millisecond, MaxPause: 5 * time.Millisecond}
}

// TestReconnect has a server go away 30 times under load: no request fails, and every byte is what
// was written last.
func TestReconnect(t *testing.T) {
	for _, connections := range []int{1, 3} {
		t.Run(fmt.Sprint(connections), func(t *testing.T) {
			const workers, span = 16, 64 << 10
			r := newRestarter(t, newMemory(t, workers*span))
			policy := quick()
			changes := make(chan nbd.State, 1000)
			policy.Notify = func(s nbd.State) { changes <- s }
			c := dial(t, r.uri(), nbd.Options{Connections: connections, Reconnect: policy})
			if n := c.Connections(); n != connections {
				t.Fatalf("%d connections", n)
			}
			ctx, cancel := context.WithCancel(t.Context())
			var load sync.WaitGroup
			for w := range workers {
				load.Go(func() { verify(t, ctx, c, int64(w)*span, span) })
			}
			for range 30 {
				r.stop()
				await(changes, 0)
				r.start()
				await(changes, connections)
			}
			cancel()
			load.Wait()
			s := c.State()
			if s.Replaced < 30 || s.Alive != connections || s.Err != nil || !s.Since.IsZero() {
				t.Errorf("in the end the state is %+v", s)
			}
		})
	}
}

// await waits until so many connections are alive.
func await(changes <-chan nbd.State, alive int) {
	for s := range changes {
		if s.Alive == alive {
			return
		}
	}
}

// verify writes and reads a range until ctx ends.
func verify(t *testing.T, ctx context.Context, c *nbd.Client, off, n int64) {
	rng := rand.New(rand.NewPCG(uint64(off), 0))
	model, got := make([]byte, n), make([]byte, n)
	for ctx.Err() == nil {
		at, length := rng.Int64N(n-1), int64(0)
		length = 1 + rng.Int64N(n-at)
		switch rng.IntN(4) {
		case 0:
			if err := c.Zero(off+at, length, 0); err != nil {
				t.Error(err)
				return
			}
			clear(model[at:][:length])
		case 1:
			if err := c.Sync(); err != nil {
				t.Error(err)
				return
			}
		default:
			for i := range model[at:][:length] {
				model[at:][i] = byte(rng.Uint32())
			}
			if _, err := c.WriteAt(model[at:][:length], off+at); err != nil {
				t.Error(err)
				return
			}
		}
		if _, err := c.ReadAt(got, off); err != nil || !bytes.Equal(got, model) {
			t.Errorf("%v, or other bytes than were written last", err)
			return
		}
	}
}

// TestReconnectTimeout holds that requests fail when a minute is up, those that come later at once,
// and that the client goes on trying, ever more seldom.
func TestReconnectTimeout(t *testing.T) {
	m := newMemory(t, 1<<20) // Outside of the bubble: it stays until the test ends.
	synctest.Test(t, func(t *testing.T) {
		e, err := server.NewExport(m, server.Options{})
		if err != nil {
			t.Fatal(err)
		}
		s := &server.Server{Exports: map[string]*server.Export{"disk": e}}
		var up atomic.Bool
		var attempts atomic.Int64
		var far net.Conn
		errAway := errors.New("away")
		o := nbd.Options{Reconnect: new(nbd.Reconnect), Dial: func(context.Context) (net.Conn, error) {
			attempts.Add(1)
			if !up.Load() {
				return nil, errAway
			}
			near, theirs := net.Pipe()
			far = theirs
			go func() {
				if session, err := s.Handshake(theirs); err == nil {
					session.Conn().Transmit()
				}
			}()
			return near, nil
		}}
		up.Store(true)
		c, err := nbd.URI{Export: "disk"}.Dial(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		up.Store(false)
		far.Close()
		begun := time.Now()
		buf := make([]byte, 512)
		for _, want := range []time.Duration{time.Minute, time.Minute} {
			_, err := c.ReadAt(buf, 0)
			if took := time.Since(begun); !errors.Is(err, errAway) || took != want {
				t.Errorf("after %v: %v, want an error after %v", took, err, want)
			}
		}
		// 100 ms, 200 ms and so on, and then every five seconds, give or take a quarter.
		if n := attempts.Load(); n < 12 || n > 24 {
			t.Errorf("%d attempts in a minute", n)
		}
		if s := c.State(); s.Alive != 0 || !s.Since.Equal(begun) || !errors.Is(s.Err, errAway) {
			t.Errorf("without a server the state is %+v", s)
		}
		up.Store(true)
		time.Sleep(6300 * time.Millisecond) // the longest pause
		synctest.Wait()
		if _, err := c.ReadAt(buf, 0); err != nil || c.State().Replaced != 1 {
			t.Errorf("%v, state %+v", err, c.State())
		}
	})
}

// TestReconnectOther holds that another export does not take the place of the one that there was.
func TestReconnectOther(t *testing.T) {
	m := newMemory(t, 1<<20)
	for name, change := range map[string]func(*restarter){
		"it has 2097152 bytes, and had 1048576": func(r *restarter) { r.offer(newMemory(t, 2<<20), server.Options{}) },
		"its flags are":                         func(r *restarter) { r.offer(m, server.Options{ReadOnly: true}) },
		"its block sizes are":                   func(r *restarter) { r.offer(m, server.Options{BlockSize: 4096}) },
		"no such export":                        func(r *restarter) { r.name = "other" },
	} {
		r := newRestarter(t, m)
		policy := quick()
		policy.Timeout = 30 * time.Millisecond
		lost := make(chan nbd.State, 100)
		policy.Notify = func(s nbd.State) { lost <- s }
		c := dial(t, r.uri(), nbd.Options{Reconnect: policy})
		r.stop()
		change(r)
		r.start()
		for st := range lost {
			if st.Err != nil && strings.Contains(st.Err.Error(), name) {
				break
			}
		}
		if _, err := c.ReadAt(make([]byte, 512), 0); err == nil {
			t.Errorf("%s: it is read", name)
		}
	}
}

// TestReconnectClose holds that a client that is closed while its server is away lets go of
// everybody.
func TestReconnectClose(t *testing.T) {
	r := newRestarter(t, newMemory(t, 1<<20))
	policy := quick()
	lost := make(chan nbd.State, 1)
	policy.Notify = func(s nbd.State) { lost <- s }
	c := dial(t, r.uri(), nbd.Options{Reconnect: policy})
	r.stop()
	<-lost
	failed := make(chan error)
	go func() {
		_, err := c.ReadAt(make([]byte, 512), 0)
		failed <- err
	}()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.ReadAtContext(ctx, make([]byte, 512), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("a read that was given up: %v", err)
	}
	if _, err := c.WriteAtContext(ctx, make([]byte, 512), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("a write that was given up: %v", err)
	}
	c.Close()
	if err := <-failed; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a read that waits for the server: %v", err)
	}
}

// TestReconnectAwait holds that Dial waits for a server that is away, and not for an export that is
// not there.
func TestReconnectAwait(t *testing.T) {
	r := newRestarter(t, newMemory(t, 1<<20))
	r.stop()
	policy := quick()
	policy.Await = true
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := r.uri().Dial(ctx, nbd.Options{Reconnect: policy}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody comes: %v", err)
	}
	dialled := make(chan *nbd.Client)
	go func() { dialled <- dial(t, r.uri(), nbd.Options{Reconnect: policy}) }()
	r.start()
	if c := <-dialled; c.Size() != 1<<20 {
		t.Errorf("%d bytes", c.Size())
	}
	u := r.uri()
	u.Export = "no"
	var refused *nbd.OptionError
	if _, err := u.Dial(t.Context(), nbd.Options{Reconnect: policy}); !errors.As(err, &refused) {
		t.Errorf("an export that is not there: %v", err)
	}
}
