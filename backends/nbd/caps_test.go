package nbd_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/backends/nbd"
	"github.com/nbdctl/nbdctl/server/wire"
)

// TestCaps holds what a client can do, by the flags of the export.
func TestCaps(t *testing.T) {
	const (
		has, readOnly, flush, fua, rotational, trim, zeroes, df = 1, 2, 4, 8, 16, 32, 64, 128
		multi, resize, cache, fast, payload                     = 256, 512, 1024, 2048, 4096

		always     = backends.CapReadContext
		write      = always | backends.CapWrite | backends.CapWriteContext
		everything = write | backends.CapSync | backends.CapFUA | backends.CapTrim | backends.CapZero |
			backends.CapCache
		both = backends.CapExtents | backends.CapContexts
	)
	some := nbd.Contexts{{Name: "base:allocation", ID: 1}, {Name: dirty, ID: 2}}
	for _, tt := range []struct {
		flags    uint16
		contexts nbd.Contexts
		readOnly bool // the client does not want to write
		want     backends.Caps
	}{
		{has, nil, false, write},
		{has | readOnly, nil, false, always},
		{has | flush, nil, false, write | backends.CapSync},
		{has | fua, nil, false, write | backends.CapFUA},
		{has | trim, nil, false, write | backends.CapTrim},
		{has | zeroes, nil, false, write | backends.CapZero},
		{has | cache, nil, false, write | backends.CapCache},
		{has | rotational | df | multi | resize | payload, nil, false, write},
		{has | fast, nil, false, write}, // It says nothing without zeroes.
		{has | fast | zeroes, nil, false, write | backends.CapZero},
		{0xffff &^ readOnly, nil, false, everything},
		{0xffff, nil, false, always | backends.CapCache},
		{0xffff &^ readOnly, nil, true, always | backends.CapCache},
		{has, some, false, write | both},
		{has, some[:1], false, write | backends.CapExtents},
		{has, some[1:], false, write | backends.CapContexts},
		{has | readOnly, some, false, always | both},
		{0xffff &^ readOnly, some, false, everything | both},
	} {
		t.Run(fmt.Sprintf("%#x, %d, %v", tt.flags, len(tt.contexts), tt.readOnly), func(t *testing.T) {
			bubbleWith(t, structured, nbd.Options{ReadOnly: tt.readOnly}, func(t *testing.T, r *rig) {
				if got := r.c.Caps(); got != tt.want {
					t.Errorf("%v, want %v", got, tt.want)
				}
				if got := backends.Probe(r.c).Caps; got != tt.want {
					t.Errorf("a probe says %v, want %v", got, tt.want)
				}
				for command, needs := range map[u16]backends.Caps{
					cmdWrite: backends.CapWrite, cmdFlush: backends.CapSync, cmdTrim: backends.CapTrim,
					cmdCache: backends.CapCache, cmdZeroes: backends.CapZero, cmdStatus: backends.CapExtents,
				} {
					if tt.want&needs != 0 {
						continue
					}
					err := (<-r.makes(command)).err // It does not reach the server.
					if !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, syscall.EROFS) {
						t.Errorf("command %d: %v", command, err)
					}
				}
				if tt.want&backends.CapFUA == 0 {
					if _, err := r.c.WriteAtFUA(make([]byte, 5), 0); err == nil {
						t.Error("WriteAtFUA succeeds")
					}
				}
				err := r.effect(func() error { return r.c.Zero(0, 512, backends.ZeroFast) })
				if tt.flags&fast == 0 || tt.want&backends.CapZero == 0 {
					if got := <-err; got.err == nil {
						t.Error("a fast Zero succeeds")
					}
				} else {
					r.expect(cmdZeroes, 0x10, 0, piece{0, 512})
				}
				r.works()
			}, func(a *nbd.Agreement) { a.Flags, a.Contexts = wire.Flags(tt.flags), tt.contexts })
		})
	}
}

// TestFacts holds what a client tells of itself.
func TestFacts(t *testing.T) {
	for _, tt := range []struct {
		told wire.BlockSizes
		want backends.BlockSizes
	}{
		{wire.BlockSizes{}, backends.BlockSizes{Preferred: 4096}},
		{wire.BlockSizes{Minimum: 1, Preferred: 512, Maximum: 1}, backends.BlockSizes{Minimum: 1, Preferred: 512}},
		{wire.BlockSizes{Minimum: 65536, Preferred: 1 << 31, Maximum: 1<<32 - 1},
			backends.BlockSizes{Minimum: 65536, Preferred: 1 << 30}},
	} {
		each(t, forms, func(t *testing.T, r *rig) {
			if got := r.c.BlockSizes(); got != tt.want {
				t.Errorf("%+v, want %+v", got, tt.want)
			}
			if r.c.Size() != rigSize || r.c.Connections() != 1 || r.c.Agreement().BlockSizes != tt.told {
				t.Errorf("%d bytes, %d connections, %+v", r.c.Size(), r.c.Connections(), r.c.Agreement())
			}
			var want []backends.Context
			if r.form != simple {
				want = []backends.Context{{Name: dirty, Wide: r.form == extended}}
			}
			if got := r.c.Contexts(); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("contexts %+v, want %+v", got, want)
			}
		}, func(a *nbd.Agreement) { a.BlockSizes = tt.told })
	}
	bubble(t, extended, func(t *testing.T, r *rig) {
		if got := r.c.Contexts(); len(got) != 1 || got[0].Wide {
			t.Errorf("contexts %+v", got)
		}
	}, func(a *nbd.Agreement) {
		a.Contexts = nbd.Contexts{{Name: "qemu:dirty-bitmap:b"}, {Name: "base:allocation", ID: 1}}
	})
}

// TestWholeBlocks holds that an export ends with its last whole block, of the size that the server
// or the caller wants.
func TestWholeBlocks(t *testing.T) {
	for _, tt := range []struct {
		told   int64
		server uint32
		caller int
		want   int64
	}{
		{1023, 0, 0, 1023}, {1023, 1, 0, 1023}, {1023, 512, 0, 512}, {1024, 512, 0, 1024}, {511, 512, 0, 0},
		{5000, 512, 4096, 4096}, {5000, 0, 4096, 4096}, {9000, 4096, 512, 8192},
		{math.MaxInt64, 65536, 1, math.MaxInt64 - 65535},
	} {
		for _, f := range forms {
			bubbleWith(t, f, nbd.Options{BlockSize: tt.caller}, func(t *testing.T, r *rig) {
				if got := r.c.Size(); got != tt.want {
					t.Errorf("%d bytes for %+v", got, tt)
				}
				if n, err := r.c.ReadAt(make([]byte, 1), tt.want); n != 0 || err != io.EOF {
					t.Errorf("%d, %v for %+v", n, err, tt)
				}
				if _, err := r.c.WriteAt(make([]byte, 65536), tt.want); !errors.Is(err, syscall.ENOSPC) {
					t.Errorf("%v for %+v", err, tt)
				}
			}, func(a *nbd.Agreement) {
				if a.Size = tt.told; tt.server > 0 {
					blocks(tt.server, 1<<20)(a)
				}
			})
		}
	}
}

// TestImpossibleOptions holds that they are refused before anything is said.
func TestImpossibleOptions(t *testing.T) {
	for _, o := range []nbd.Options{{Connections: -1}, {MaxInFlight: -1}, {MaxInFlight: 65537}, {Timeout: -1},
		{BlockSize: -1}, {BlockSize: 513}} {
		synctest.Test(t, func(t *testing.T) {
			client, server := net.Pipe()
			if c, err := nbd.New(t.Context(), client, "disk", o); err == nil {
				t.Errorf("%+v: %v", o, c)
			}
			if _, err := server.Write([]byte("x")); err == nil {
				t.Error("the connection is open")
			}
			o.Dial = func(context.Context) (net.Conn, error) {
				t.Error("a connection is made")
				return nil, net.ErrClosed
			}
			if c, err := (nbd.URI{Network: "unix", Address: "/s"}).Dial(t.Context(), o); err == nil {
				t.Errorf("%+v: %v", o, c)
			}
			s := &nbd.Session{NetConn: client}
			if c, err := s.Client(o); err == nil {
				t.Errorf("%+v: %v", o, c)
			}
		})
	}
}
