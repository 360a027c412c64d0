package nbd_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/testdata/certs"
)

// A troupe are the servers of a client's connections, each with its own part of a dialogue.
type troupe struct {
	t      *testing.T
	parts  [][]turn
	made   int
	played []chan error
}

// dial is for Options. Who calls it does so one after the other.
func (p *troupe) dial(context.Context) (net.Conn, error) {
	if p.made == len(p.parts) {
		return nil, errGivenUp
	}
	client, server := net.Pipe()
	part, played := p.parts[p.made], make(chan error, 1)
	p.made++
	p.played = append(p.played, played)
	go func() { played <- play(server, part) }()
	return client, nil
}

// end fails the test unless each client has hung up behind its part, and all parts were played.
func (p *troupe) end() {
	p.t.Helper()
	for i, played := range p.played {
		if err := <-played; err != nil {
			p.t.Errorf("connection %d: %v", i, err)
		}
	}
	if p.made != len(p.parts) {
		p.t.Errorf("%d connections of %d were made", p.made, len(p.parts))
	}
}

// goes is the dialogue of who wants no more than an export by simple replies.
func goes(size u64, flags u16, sizes ...u32) []turn {
	says := sized(optGo, size, flags)
	if len(sizes) == 3 {
		says = cat(says, answer(optGo, repInfo, infoBlockSize, sizes[0], sizes[1], sizes[2]))
	}
	return greeted(turn{info(optGo, "disk"), cat(says, answer(optGo, repAck))})
}

// staged dials an export for somebody else, of servers that play their parts.
func staged(t *testing.T, o nbd.Options, parts [][]turn, f func(t *testing.T, d *nbd.Direct)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		t.Helper()
		p := &troupe{t: t, parts: parts}
		o.Dial = p.dial
		d, err := nbd.URI{Network: "unix", Address: "/s", Export: "disk"}.DialDirect(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		f(t, d)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		p.end()
	})
}

// TestDirectDialogue holds that a server is asked for the export and nothing else, on each
// connection, whatever contexts and forms the options have.
func TestDirectDialogue(t *testing.T) {
	part := goes(4096, 1)
	o := nbd.Options{Contexts: []string{dirty}}
	staged(t, o, [][]turn{part, part, part}, func(t *testing.T, d *nbd.Direct) {
		for range 3 {
			nc, err := d.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			nc.Close()
		}
		if nc, err := d.Dial(t.Context()); nc != nil || !errors.Is(err, errGivenUp) {
			t.Errorf("without a server: %v, %v", nc, err)
		}
	})
}

// TestDirectSizes holds the size in whole blocks, of the options and of the server, and the block
// sizes as the kernel can have them.
func TestDirectSizes(t *testing.T) {
	for _, tt := range []struct {
		size  u64
		block int
		sizes []u32
		want  int64
		are   backends.BlockSizes
	}{
		{10000, 0, nil, 10000, backends.BlockSizes{}},
		{10000, 512, nil, 9728, backends.BlockSizes{}},
		{10000, 512, []u32{1, 4096, 8192}, 9728, backends.BlockSizes{Minimum: 1, Preferred: 4096, Maximum: 8192}},
		{10000, 0, []u32{4096, 4096, 8192}, 8192, backends.BlockSizes{Minimum: 4096, Preferred: 4096, Maximum: 8192}},
		{10000, 512, []u32{4096, 8192, 8192}, 8192, backends.BlockSizes{Minimum: 4096, Preferred: 8192, Maximum: 8192}},
		{10000, 8192, []u32{512, 4096, 8192}, 8192, backends.BlockSizes{Minimum: 512, Preferred: 4096, Maximum: 8192}},
		{511, 512, nil, 0, backends.BlockSizes{}},
		{1<<63 - 1, 4096, []u32{1, 1 << 31, 0xffffffff}, 1<<63 - 4096, backends.BlockSizes{
			Minimum: 1, Preferred: 1 << 30, Maximum: 1 << 30,
		}},
	} {
		t.Run(fmt.Sprint(tt.size, tt.block, tt.sizes), func(t *testing.T) {
			o := nbd.Options{BlockSize: tt.block}
			staged(t, o, [][]turn{goes(tt.size, 1, tt.sizes...)}, func(t *testing.T, d *nbd.Direct) {
				if d.Size() != tt.want || d.BlockSizes() != tt.are || d.Agreement().Size != int64(tt.size) {
					t.Errorf("%d bytes in blocks %+v of %d", d.Size(), d.BlockSizes(), d.Agreement().Size)
				}
			})
		})
	}
}

// TestDirectContinues holds which other export a later connection may have, and that one which is
// refused is hung up on.
func TestDirectContinues(t *testing.T) {
	const flags, multi, trim, readOnly, rotational u16 = 1, 256, 32, 2, 16
	for _, tt := range []struct {
		name        string
		connections int
		first, next []turn
		says        string // empty: it will do
	}{
		{"the same", 2, goes(4096, flags|multi), goes(4096, flags|multi), ""},
		{"more", 2, goes(4096, flags|multi), goes(4096, flags|multi|trim), ""},
		{"a disk that turns no more", 1, goes(4096, flags|rotational), goes(4096, flags), ""},
		{"one connection need not agree", 1, goes(4096, flags|multi), goes(4096, flags), ""},
		{"several must", 2, goes(4096, flags|multi), goes(4096, flags), "its flags are"},
		{"less", 1, goes(4096, flags|trim), goes(4096, flags), "its flags are"},
		{"read-only", 1, goes(4096, flags), goes(4096, flags|readOnly), "its flags are"},
		{"not read-only", 1, goes(4096, flags|readOnly), goes(4096, flags), "its flags are"},
		{"larger within the last block", 1, goes(4096, flags), goes(4097, flags), "it has 4097 bytes, and had 4096"},
		{"smaller", 1, goes(4096, flags), goes(512, flags), "it has 512 bytes, and had 4096"},
		{
			"shorter requests", 1, goes(4096, flags, 1, 4096, 1<<20), goes(4096, flags, 1, 4096, 1<<19),
			"its block sizes are",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := nbd.Options{Connections: tt.connections, BlockSize: 512}
			staged(t, o, [][]turn{tt.first, tt.next}, func(t *testing.T, d *nbd.Direct) {
				nc, err := d.Dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				nc.Close()
				nc, err = d.Dial(t.Context())
				if err == nil {
					nc.Close()
				}
				if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
					t.Errorf("it says %v, want %q", err, tt.says)
				}
			})
		})
	}
}

// TestDirectAtOnce holds that of several who dial at the same time one gets the first connection,
// and the others get one each of their own.
func TestDirectAtOnce(t *testing.T) {
	b := newMemory(t, 4096)
	d := direct(t, serve(t, b, new(server.Server)), nbd.Options{Connections: 8})
	var all sync.Map
	var dialling sync.WaitGroup
	for range 8 {
		dialling.Go(func() {
			nc, err := d.Dial(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			if _, twice := all.LoadOrStore(nc, true); twice {
				t.Error("two have got the same connection")
			}
		})
	}
	dialling.Wait()
	all.Range(func(nc, _ any) bool {
		if got := firstBytes(t, nc.(net.Conn), 8); !bytes.Equal(got, make([]byte, 8)) {
			t.Errorf("it reads %x", got)
		}
		nc.(net.Conn).Close()
		return true
	})
}

// TestDirectPatience holds for how long Dial waits for a server that says nothing: for an attempt,
// or until its context ends.
func TestDirectPatience(t *testing.T) {
	for name, tt := range map[string]struct {
		policy *nbd.Reconnect
		ctx    time.Duration
		want   time.Duration
	}{
		"nothing is said":  {nil, time.Hour, 10 * time.Second},
		"no attempt is":    {&nbd.Reconnect{}, time.Hour, 10 * time.Second},
		"an attempt":       {&nbd.Reconnect{Attempt: 3 * time.Second}, time.Hour, 3 * time.Second},
		"a long attempt":   {&nbd.Reconnect{Attempt: time.Minute}, time.Hour, time.Minute},
		"a short patience": {&nbd.Reconnect{Attempt: time.Minute}, time.Second, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			part := goes(4096, 1)
			o := nbd.Options{Reconnect: tt.policy}
			staged(t, o, [][]turn{part, {}}, func(t *testing.T, d *nbd.Direct) {
				first, err := d.Dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				first.Close()
				ctx, cancel := context.WithTimeoutCause(t.Context(), tt.ctx, errGivenUp)
				defer cancel()
				begun := time.Now()
				nc, err := d.Dial(ctx)
				if took := time.Since(begun); nc != nil || err == nil || took != tt.want {
					t.Errorf("after %v: %v, %v", took, nc, err)
				}
				says := "does not answer"
				if tt.ctx == tt.want {
					says = errGivenUp.Error()
				}
				if !strings.Contains(fmt.Sprint(err), says) {
					t.Errorf("it says %v, want %q", err, says)
				}
			})
		})
	}
}

// TestDirectAwait holds that only who wants to waits for a server that is away at first.
func TestDirectAwait(t *testing.T) {
	for _, await := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			p := &troupe{t: t, parts: [][]turn{goes(4096, 1)}}
			asked := 0
			o := nbd.Options{Reconnect: &nbd.Reconnect{Await: await}}
			o.Dial = func(ctx context.Context) (net.Conn, error) {
				if asked++; asked < 4 {
					return nil, errGivenUp
				}
				return p.dial(ctx)
			}
			d, err := nbd.URI{Network: "unix", Address: "/s", Export: "disk"}.DialDirect(t.Context(), o)
			if !await {
				if d != nil || !errors.Is(err, errGivenUp) || asked != 1 {
					t.Errorf("%v, %v, asked %d times", d, err, asked)
				}
				return
			}
			if err != nil || asked != 4 {
				t.Fatalf("%v, asked %d times", err, asked)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			p.end()
		})
	}
}

// TestDirectClosed holds that after Close a connection is a new one.
func TestDirectClosed(t *testing.T) {
	part := goes(4096, 1)
	staged(t, nbd.Options{}, [][]turn{part, part}, func(t *testing.T, d *nbd.Direct) {
		if err := errors.Join(d.Close(), d.Close()); err != nil {
			t.Error(err)
		}
		nc, err := d.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := nc.Close(); err != nil {
			t.Errorf("it is closed: %v", err)
		}
	})
}

// TestDirectImpossible holds that nothing is dialled for options or URIs that can't be.
func TestDirectImpossible(t *testing.T) {
	for name, o := range map[string]nbd.Options{
		"not a power of two":       {BlockSize: 1000},
		"connections":              {Connections: -1},
		"ca-cert.pem":              {},
		"nbd: a timeout of -1s is": {Timeout: -time.Second},
	} {
		o.Dial = func(context.Context) (net.Conn, error) {
			t.Error("a connection is made")
			return nil, net.ErrClosed
		}
		u := nbd.URI{Network: "unix", Address: "/s", TLS: true, Certificates: filepath.Join(t.TempDir(), "none")}
		if d, err := u.DialDirect(t.Context(), o); d != nil || !strings.Contains(fmt.Sprint(err), name) {
			t.Errorf("%v, %v, want %q", d, err, name)
		}
	}
	if d, err := nbd.DialDirect(t.Context(), "http://host", nbd.Options{}); d != nil || err == nil {
		t.Errorf("another protocol: %v, %v", d, err)
	}
}

// TestDirectTLS holds that a connection with TLS is one that can be told from others.
func TestDirectTLS(t *testing.T) {
	authority, dir := certs.New(t), t.TempDir()
	authority.Write(t, dir)
	client, server := socketpair(t)
	served := make(chan error, 1)
	go func() {
		config := &tls.Config{Certificates: []tls.Certificate{authority.Server}}
		served <- secretly(server, greeted(startTLS), config, []turn{hasGo})
	}()
	u := nbd.URI{Network: "tcp", Address: "localhost:1", Export: "disk", TLS: true, Certificates: dir}
	d := direct(t, u, nbd.Options{Dial: func(context.Context) (net.Conn, error) { return client, nil }})
	nc, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, secret := nc.(*tls.Conn); !secret || !d.Agreement().TLS || d.Agreement().Structured || d.Size() != 4096 {
		t.Errorf("a %T, agreed on %+v", nc, d.Agreement())
	}
	nc.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
