package nbd_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A pretender is a server in a bubble that can be away.
type pretender struct {
	s       *server.Server
	up      atomic.Bool
	dialled atomic.Int64
}

var errAway = errors.New("away")

func newPretender(t *testing.T, m backends.Backend) *pretender {
	t.Helper()
	e, err := server.NewExport(m, server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return &pretender{s: &server.Server{Exports: map[string]*server.Export{"disk": e}}}
}

func (p *pretender) dial(context.Context) (net.Conn, error) {
	if p.dialled.Add(1); !p.up.Load() {
		return nil, errAway
	}
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		if session, err := p.s.Handshake(far); err == nil {
			session.Conn().Transmit()
		}
	}()
	return near, nil
}

// inherit makes a client of a document without files, and has it closed when the test ends.
func inherit(t *testing.T, d nbd.Document, o nbd.Options, files ...*os.File) *nbd.Client {
	t.Helper()
	c, err := nowhere.Inherit(d, files, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestInheritNothing holds that a client without connections waits for the server as long as is
// left of the time since the process before has lost it, and works when it is there.
func TestInheritNothing(t *testing.T) {
	m := newMemory(t, 1<<20) // Outside of the bubble: it stays until the test ends.
	for name, tt := range map[string]struct{ ago, left time.Duration }{
		"just now":       {0, time.Minute},
		"a while ago":    {50 * time.Second, 10 * time.Second},
		"too long ago":   {time.Hour, 0},
		"in the future":  {-time.Hour, time.Minute}, // The clock was set meanwhile.
		"not told":       {-1, time.Minute},
		"with some left": {59 * time.Second, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPretender(t, m)
				p.up.Store(true)
				first, err := nowhere.Dial(t.Context(), nbd.Options{Dial: p.dial, Connections: 2})
				if err != nil {
					t.Fatal(err)
				}
				h, err := first.HandOver() // Pipes can't go along.
				if err != nil || len(h.Files) > 0 || !h.Document.Since.Equal(time.Now()) {
					t.Fatalf("%v, %+v", err, h)
				}
				if err := h.Leave(); err != nil {
					t.Error(err)
				}
				p.up.Store(false)
				p.dialled.Store(0)
				d := h.Document
				if d.Since = d.Since.Add(-tt.ago); tt.ago == -1 {
					d.Since = time.Time{}
				}
				told := make(chan nbd.State, 1000)
				policy := &nbd.Reconnect{Notify: func(s nbd.State) { told <- s }}
				c := inherit(t, d, nbd.Options{Dial: p.dial, Connections: 5, Reconnect: policy})
				begun := time.Now()
				since := begun
				if tt.ago > 0 {
					since = begun.Add(-tt.ago)
				}
				if s := c.State(); s.Alive != 0 || !s.Since.Equal(since) || s.Err == nil || s.Replaced != 0 {
					t.Errorf("the state is %+v", s)
				}
				synctest.Wait()
				if len(told) < 2 {
					t.Fatal("it does not tell that its connections are lost")
				}
				if s := <-told; s.Alive != 0 || !s.Since.Equal(since) {
					t.Errorf("it tells of %+v", s)
				}
				if n := p.dialled.Load(); n != 2 {
					t.Errorf("it dials %d times at once", n)
				}
				_, err = c.ReadAt(make([]byte, 512), 0)
				if took := time.Since(begun); !errors.Is(err, errAway) || took != tt.left {
					t.Errorf("%v after %v", err, took)
				}
				p.up.Store(true)
				time.Sleep(6300 * time.Millisecond) // the longest pause
				synctest.Wait()
				_, err = c.ReadAt(make([]byte, 512), 0)
				if s := c.State(); err != nil || s.Alive != 2 || s.Err != nil || !s.Since.IsZero() || s.Replaced != 2 {
					t.Errorf("%v, in the end the state is %+v", err, s)
				}
				if a := c.Agreement(); !a.Extended || !slices.Equal(a.Contexts, first.Agreement().Contexts) {
					t.Errorf("the agreement is %+v", a)
				}
			})
		})
	}
}

// TestHandOverLost holds that a document tells since when there is no connection.
func TestHandOverLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := document(1)
		d.Since = time.Now().Add(-time.Second)
		o := nbd.Options{Reconnect: new(nbd.Reconnect), Dial: new(pretender).dial}
		for range 3 { // from one to the next
			time.Sleep(time.Second)
			c := inherit(t, d, o)
			h, err := c.HandOver()
			if err != nil || !h.Document.Since.Equal(d.Since) || len(h.Document.Connections) != 1 {
				t.Fatalf("%v, %+v", err, h)
			}
			h.Leave()
			d = h.Document
		}
	})
	for name, o := range map[string]nbd.Options{"kept": {Reconnect: quick()}, "not kept": {}} {
		t.Run(name, func(t *testing.T) {
			bubbleWith(t, simple, o, func(t *testing.T, r *rig) {
				r.nc.Close()
				synctest.Wait()
				time.Sleep(time.Second)
				h, err := r.c.HandOver()
				if err != nil || !h.Document.Since.Equal(time.Now()) || !h.Document.Connections[0].Dead {
					t.Fatalf("%v, %+v", err, h)
				}
				h.Resume()
				if h, err = r.c.HandOver(); err != nil {
					t.Fatal(err)
				}
				if err := h.Leave(); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("Leave: %v, want how it was lost", err)
				}
				if err := r.c.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			})
		})
	}
}

// TestHandOverTooMany holds that a client is not handed over whose document nobody takes, and goes
// on.
func TestHandOverTooMany(t *testing.T) {
	m := newMemory(t, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		p := newPretender(t, m)
		p.up.Store(true)
		for n, possible := range map[int]bool{64: true, 65: false} {
			c, err := nowhere.Dial(t.Context(), nbd.Options{Dial: p.dial, Connections: n})
			if err != nil {
				t.Fatal(err)
			}
			h, err := c.HandOver()
			if (err == nil) != possible {
				t.Errorf("%d connections: %v", n, err)
			}
			if h != nil {
				h.Resume()
			}
			if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
				t.Error(err)
			}
			c.Close()
		}
	})
}

// TestInheritOptions holds which options count.
func TestInheritOptions(t *testing.T) {
	d := document(1)
	d.Agreement.Flags |= wire.FlagSendFlush
	d.Agreement.Size = 10000
	for _, tt := range []struct {
		o     nbd.Options
		size  int64
		write bool
	}{
		{nbd.Options{}, 10000, true},
		{nbd.Options{BlockSize: 4096}, 8192, true},
		{nbd.Options{ReadOnly: true}, 10000, false},
	} {
		tt.o.Reconnect = quick()
		c := inherit(t, d, tt.o)
		if c.Size() != tt.size || (c.Caps()&backends.CapWrite != 0) != tt.write {
			t.Errorf("%d bytes, %v with %+v", c.Size(), c.Caps(), tt.o)
		}
	}
}

// TestInheritAsks holds that the negotiation of a replacement is for what was agreed on before,
// whatever the options say.
func TestInheritAsks(t *testing.T) {
	for name, o := range map[string]nbd.Options{
		"nothing": {}, "less": {NoStructured: true}, "more": {Contexts: []string{"y:z"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := document(1)
				d.Agreement.Structured, d.Agreement.Extended = true, true
				d.Agreement.Contexts = nbd.Contexts{{Name: "base:allocation"}, {Name: dirty, ID: 1}}
				client, far := net.Pipe()
				defer far.Close()
				o.Reconnect = new(nbd.Reconnect)
				o.Dial = func(context.Context) (net.Conn, error) { return client, nil }
				c := inherit(t, d, o)
				wrong := speak(far, greeted(hasExtended,
					turn{contexts(optSetContexts, "disk", "base:allocation", dirty), cat(
						answer(optSetContexts, repContext, u32(5), "base:allocation"),
						answer(optSetContexts, repContext, u32(6), dirty), answer(optSetContexts, repAck))},
					turn{info(optGo, "disk"), cat(sized(optGo, 1<<20, 0x101), answer(optGo, repAck))}))
				if wrong != nil {
					t.Error(wrong)
				}
				r := &rig{t: t, form: extended, c: c, nc: far}
				r.works()
			})
		})
	}
}

// TestInheritDirect holds that a Direct goes on with what was agreed on before, which it does not
// ask the server for, and refuses another export.
func TestInheritDirect(t *testing.T) {
	var l lines
	b := newMemory(t, 10000)
	if _, err := b.(io.WriterAt).WriteAt([]byte("a disk"), 0); err != nil {
		t.Fatal(err)
	}
	u := serve(t, b, new(server.Server))
	a := direct(t, u, nbd.Options{}).Agreement()
	text, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	var told nbd.Agreement
	if err := json.Unmarshal(text, &told); err != nil {
		t.Fatal(err)
	}
	d, err := u.InheritDirect(told, nbd.Options{BlockSize: 512, Dial: l.dialTo(u), Contexts: []string{"x:y"}})
	if err != nil {
		t.Fatal(err)
	}
	if d.Size() != 9728 || !cmp.Equal(d.Agreement(), a, cmp.AllowUnexported(nbd.Info{})) || l.made != 0 {
		t.Errorf("%d bytes, %+v, %d connections", d.Size(), d.Agreement(), l.made)
	}
	for range 2 {
		nc, err := d.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := string(firstBytes(t, nc, 6)); got != "a disk" {
			t.Errorf("%q", got)
		}
		nc.Close()
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	told.Size++
	if d, err = u.InheritDirect(told, nbd.Options{}); err != nil {
		t.Fatal(err)
	}
	const other = "it has 10000 bytes, and had 10001"
	if nc, err := d.Dial(t.Context()); err == nil || !strings.Contains(err.Error(), other) {
		t.Errorf("%v, %v", nc, err)
	}
	structured := told
	structured.Structured = true
	negative := told
	negative.Size = -1
	for says, a := range map[string]nbd.Agreement{"structured replies": structured, "-1 bytes": negative} {
		if d, err := u.InheritDirect(a, nbd.Options{}); d != nil || err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, %v; want %q", d, err, says)
		}
	}
	if d, err := u.InheritDirect(told, nbd.Options{BlockSize: 3}); d != nil || err == nil {
		t.Errorf("%v, %v", d, err)
	}
}
