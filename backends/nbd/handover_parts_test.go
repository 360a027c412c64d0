//go:build unix && !aix

package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/wire"
)

// TestHandOverDead holds that a connection that was lost is the successor's to replace, and that
// one that the client has made meanwhile ends with it.
func TestHandOverDead(t *testing.T) {
	u, l := counted(t, "unix", nil)
	var dialled []net.Conn
	var away atomic.Bool
	changes := make(chan nbd.State, 1000)
	policy := quick()
	policy.Notify = func(s nbd.State) { changes <- s }
	o := nbd.Options{Connections: 3, Reconnect: policy, Dial: func(context.Context) (net.Conn, error) {
		if away.Load() {
			return nil, errAway
		}
		nc, err := net.Dial(u.Network, u.Address)
		if len(dialled) < 3 {
			dialled = append(dialled, nc)
		}
		return nc, err
	}}
	c := dial(t, u, o)
	away.Store(true)
	dialled[1].Close()
	await(changes, 2)
	h := handOver(t, c, 2)
	dead := func(d nbd.Document) (all []bool) {
		for _, k := range d.Connections {
			all = append(all, k.Dead)
		}
		return all
	}
	d, files := pass(t, h)
	if got := dead(d); !cmp.Equal(got, []bool{false, true, false}) || !d.Since.IsZero() {
		t.Errorf("dead are %v, since %v", got, d.Since)
	}
	if c, err := u.Inherit(d, []*os.File{copied(t, files[0]), copied(t, files[1])}, nbd.Options{}); err == nil {
		t.Errorf("%+v: one is missing, and nobody replaces it", c.State())
	}
	others := make(chan nbd.State, 100)
	next, err := u.Inherit(d, files, nbd.Options{Reconnect: &nbd.Reconnect{Notify: func(s nbd.State) { others <- s }}})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if s := <-others; s.Alive != 2 || s.Err == nil || !s.Since.IsZero() || s.Replaced != 0 {
		t.Errorf("the first that it tells is %+v", s)
	}
	await(others, 3)
	if s := next.State(); s != (nbd.State{Alive: 3, Replaced: 1}) || next.Connections() != 3 {
		t.Errorf("the state is %+v", s)
	}
	away.Store(false)
	await(changes, 3)
	if n := l.accepted.Load(); n != 5 {
		t.Errorf("there were %d connections, want 5", n)
	}
	if err := h.Leave(); err != nil {
		t.Error(err)
	}
	checkLeft(t, c)
	checkContent(t, next, 1)
	if s := next.State(); s != (nbd.State{Alive: 3, Replaced: 1}) {
		t.Errorf("in the end the state is %+v", s)
	}
}

// TestHandOverLate holds that a connection stays here while a reply is to come on it that nobody
// waits for any more, and can go along when it has come.
func TestHandOverLate(t *testing.T) {
	for _, n := range []int{100, 100 << 10} {
		for _, part := range []int{0, 10, 90} {
			t.Run(fmt.Sprintf("%d, %d", n, part), func(t *testing.T) {
				client, far := socketpair(t)
				r := newRig(t, structured, client, far, nbd.Options{})
				ctx, end := endable(t)
				is := r.readContext(ctx, make([]byte, n), 0)
				q := r.next()
				reply := r.filled(q, pattern(0, n))
				r.say(reply[:part])
				end()
				checkIs(t, (<-is).err, errGivenUp)
				h := handOver(t, r.c, 0)
				if d := h.Document; !d.Connections[0].Dead || d.Since.IsZero() {
					t.Errorf("the document is %+v", d)
				}
				h.Resume()
				r.say(reply[part:])
				r.works()
				for h == nil || len(h.Files) == 0 { // Who has given up may not know of it yet.
					var err error
					if h, err = r.c.HandOver(); err != nil {
						t.Fatal(err)
					}
					if len(h.Files) == 0 {
						h.Resume()
					}
				}
				r.c = succeed(t, h, nbd.Options{})
				r.works()
				h.Leave()
				r.works()
			})
		}
	}
	t.Run("Leave", func(t *testing.T) {
		client, far := socketpair(t)
		r := newRig(t, simple, client, far, nbd.Options{})
		ctx, end := endable(t)
		is := r.readContext(ctx, make([]byte, 100), 0)
		r.next()
		end()
		checkIs(t, (<-is).err, errGivenUp)
		if err := handOver(t, r.c, 0).Leave(); err != nil {
			t.Error(err)
		}
		if rest, err := io.ReadAll(far); len(rest) > 0 {
			t.Errorf("the server hears %x (%v)", rest, err)
		}
	})
}

// TestHandOverMeanwhile holds that requests that come while a client is handed over wait, and that
// nothing of them is sent before Resume, or at all after Leave.
func TestHandOverMeanwhile(t *testing.T) {
	for _, f := range forms {
		for _, resumes := range []bool{true, false} {
			t.Run(fmt.Sprintf("%v, %v", f, resumes), func(t *testing.T) {
				client, far := socketpair(t)
				r := newRig(t, f, client, far, nbd.Options{})
				h := handOver(t, r.c, 1)
				ctx, end := endable(t)
				given := r.readContext(ctx, make([]byte, 100), 0)
				all := []<-chan result{
					r.read(make([]byte, 100), 0), r.write(make([]byte, 100<<10), 0), r.effect(r.c.Sync),
				}
				r.hearsNothing(20 * time.Millisecond)
				end()
				checkIs(t, (<-given).err, errGivenUp)
				if !resumes {
					if err := h.Leave(); err != nil {
						t.Error(err)
					}
					for _, is := range all {
						checkIs(t, (<-is).err, net.ErrClosed)
					}
					checkLeft(t, r.c)
					if rest, err := io.ReadAll(far); len(rest) > 0 {
						t.Errorf("the server hears %x (%v)", rest, err)
					}
					return
				}
				h.Resume()
				go r.serve()
				for _, is := range all {
					if got := <-is; got.err != nil {
						t.Error(got.err)
					}
				}
			})
		}
	}
}

// hearsNothing fails the test if anything comes for so long, or the connection ends.
func (r *rig) hearsNothing(d time.Duration) {
	r.t.Helper()
	r.nc.SetReadDeadline(time.Now().Add(d))
	if n, err := r.nc.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		r.t.Fatalf("the server hears %d bytes, %v", n, err)
	}
	r.nc.SetReadDeadline(time.Time{})
}

// TestHandOverTimeout holds that a connection is not given up for the silence of a server that has
// nothing to hear.
func TestHandOverTimeout(t *testing.T) {
	const timeout = 32 * time.Millisecond
	client, far := socketpair(t)
	r := newRig(t, simple, client, far, nbd.Options{Timeout: timeout})
	h := handOver(t, r.c, 1)
	is := r.write(make([]byte, 100), 0)
	r.hearsNothing(4 * timeout)
	if s := r.c.State(); s.Alive != 1 {
		t.Errorf("the state is %+v", s)
	}
	next := succeed(t, h, nbd.Options{})
	if err := h.Leave(); err != nil {
		t.Error(err)
	}
	checkIs(t, (<-is).err, net.ErrClosed)
	r.c = next
	r.works()

	client, far = socketpair(t)
	r = newRig(t, simple, client, far, nbd.Options{Timeout: timeout})
	handOver(t, r.c, 1).Resume()
	if got := <-r.read(make([]byte, 100), 0); got.err == nil || errors.Is(got.err, net.ErrClosed) {
		t.Errorf("afterwards a server is silent: %v", got.err)
	}
}

// TestHandOverUnderLoad holds that a client that is handed over while it is used, and goes on, does
// not disturb anybody, also not those who give up.
func TestHandOverUnderLoad(t *testing.T) {
	for _, f := range forms {
		client, far := socketpair(t)
		r := newRig(t, f, client, far, nbd.Options{MaxInFlight: 8})
		go r.serve()
		var load sync.WaitGroup
		for i := range 8 {
			load.Go(func() { giveUps(t, r, rand.New(rand.NewPCG(uint64(i), uint64(f)))) })
		}
		for range 50 {
			h, err := r.c.HandOver()
			if err != nil {
				t.Fatal(err)
			}
			spin(10)
			h.Resume()
			spin(10)
		}
		load.Wait()
		if err := r.c.Close(); err != nil {
			t.Errorf("%v: %v", f, err)
		}
	}
}

// TestHandOverHangUp holds that a server that hangs up meanwhile keeps nobody, and is noticed by
// whoever has the connection then.
func TestHandOverHangUp(t *testing.T) {
	for range 100 {
		client, far := socketpair(t)
		r := newRig(t, simple, client, far, nbd.Options{})
		hung := r.effect(far.Close)
		h, err := r.c.HandOver()
		if err != nil {
			t.Fatal(err)
		}
		<-hung
		d, files := pass(t, h)
		h.Resume()
		_, err = r.c.ReadAt(make([]byte, 512), 0)
		if err == nil || errors.Is(err, net.ErrClosed) {
			t.Errorf("a read without a server: %v", err)
		}
		if len(files) == 0 {
			continue
		}
		next := inherit(t, d, nbd.Options{}, files...)
		if _, err := next.ReadAt(make([]byte, 512), 0); err == nil {
			t.Error("a read without a server")
		}
	}
}

// TestInheritContexts holds that a client goes on with a document of version 1, with the numbers of
// contexts that a connection has, and hands those over again.
func TestInheritContexts(t *testing.T) {
	d, _ := committed(t, "v1.json")
	d.Connections = append(d.Connections, d.Connections[0])
	d.Connections[2].Contexts = nbd.Contexts{{Name: "base:allocation", ID: 3}, {Name: dirty, ID: 9}}
	d.Connections = append(d.Connections[:1], d.Connections[2:]...)
	var files []*os.File
	var rigs []*rig
	for range d.Connections {
		client, far := socketpair(t)
		f, err := client.File()
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
		rigs = append(rigs, &rig{t: t, form: extended, nc: far})
	}
	d.Agreement.Flags |= wire.FlagCanMultiConn
	c := inherit(t, d, nbd.Options{}, files...)
	all := arrivals(rigs)
	for range 4 {
		is := rigs[0].call(func() (n int, err error) {
			err = c.ContextExtents(dirty, 0, 512, func(m backends.Mark) bool { n += int(m.Flags); return true })
			return n, err
		})
		a := <-all
		r, x := rigs[a.i], d.Connections[a.i].Contexts
		r.say(r.status(a.query, 0, u32(x[0].ID), 512, 1), r.status(a.query, done, u32(x[1].ID), 512, 5))
		if got := <-is; got.err != nil || got.n != 5 {
			t.Errorf("connection %d: %+v", a.i, got)
		}
	}
	h := handOver(t, c, 2)
	defer h.Resume()
	if diff := cmp.Diff(d.Connections, h.Document.Connections); diff != "" {
		t.Error(diff)
	}
}

// TestInheritNoStream holds that no socket is taken for a connection that is none, and that nothing
// stays open then.
func TestInheritNoStream(t *testing.T) {
	udp, err := net.ListenPacket("udp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	datagrams, err := net.ListenPacket("unixgram", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer datagrams.Close()
	for _, nc := range []net.PacketConn{udp, datagrams} {
		d := document(2)
		d.Connections[0].Dead, d.Connections[1].Dead = false, false
		open := len(descriptors())
		client, far := socketpair(t)
		good, err := client.File()
		if err != nil {
			t.Fatal(err)
		}
		client.Close()
		bad, err := nc.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		c, err := nowhere.Inherit(d, []*os.File{good, bad}, nbd.Options{})
		if c != nil || err == nil || !strings.Contains(err.Error(), "no stream") {
			t.Errorf("%v, %v", c, err)
		}
		if rest, err := io.ReadAll(far); len(rest) > 0 || err != nil { // All copies are closed.
			t.Errorf("the server hears %x, %v", rest, err)
		}
		if err := bad.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("the other file is open: %v", err)
		}
		far.Close()
		if n := len(descriptors()); n > open {
			t.Errorf("%d descriptors are open, and there were %d", n, open)
		}
	}
}

// TestHandOverBytes holds that what a successor sends is what the client before would have sent.
func TestHandOverBytes(t *testing.T) {
	for _, f := range forms {
		client, far := socketpair(t)
		r := newRig(t, f, client, far, nbd.Options{})
		r.works()
		h := handOver(t, r.c, 1)
		r.c = succeed(t, h, nbd.Options{})
		h.Leave()
		is := r.write(pattern(5, 100<<10), 5)
		q := r.next()
		if q.flags != r.flags(cmdWrite, 0) || q.offset != 5 || !bytes.Equal(q.data, pattern(5, 100<<10)) {
			t.Errorf("%v: a write arrives as one of %d bytes at %d, flags %#x", f, len(q.data), q.offset, q.flags)
		}
		r.say(r.ok(q))
		if got := <-is; got.err != nil {
			t.Error(got.err)
		}
		r.works()
	}
}
