package blockdev

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A farExport is an export whose server does nothing but hold its ends of the connections.
type farExport struct {
	size  int64
	flags wire.Flags
	sizes backends.BlockSizes
	l     net.Listener

	mu    sync.Mutex
	away  error // what Dial says; nil: the server is there
	dials int
	ends  []*net.TCPConn
}

func newFarExport(t *testing.T) *farExport {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &farExport{size: 1 << 20, flags: wire.FlagHasFlags | wire.FlagSendFlush | wire.FlagCanMultiConn, l: l}
	t.Cleanup(func() {
		l.Close()
		for _, nc := range f.ends {
			nc.Close()
		}
	})
	return f
}

func (f *farExport) Size() int64                     { return f.size }
func (f *farExport) Flags() wire.Flags               { return f.flags }
func (f *farExport) BlockSizes() backends.BlockSizes { return f.sizes }

func (f *farExport) Dial(context.Context) (net.Conn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dials++
	if f.away != nil {
		return nil, f.away
	}
	nc, err := net.Dial("tcp", f.l.Addr().String())
	if err != nil {
		return nil, err
	}
	end, err := f.l.Accept()
	if err != nil {
		return nil, err
	}
	f.ends = append(f.ends, end.(*net.TCPConn))
	return nc, nil
}

// set has the server be away, or there.
func (f *farExport) set(away error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away = away
}

// reset ends the connection that was made last, as a machine does that has forgotten it.
func (f *farExport) reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	end := f.ends[len(f.ends)-1]
	_ = end.SetLinger(0)
	end.Close()
}

func (f *farExport) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dials
}

// await waits until a device has asked for so many connections.
func (f *farExport) await(t *testing.T, d *Device, dials int) {
	t.Helper()
	for f.count() < dials {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-d.Done():
			t.Fatal(d.Err())
		}
	}
}

// connectedFar connects a kernel to an export.
func connectedFar(t *testing.T, f *farExport, o Options) (*nbdnltest.Kernel, *Device) {
	t.Helper()
	k, m, lab := labOn(t, nbdnltest.Options{})
	o.Client = lab.Client
	d, err := m.connectRemote(t.Context(), anyIndex, f, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return k, d
}

// TestRemoteSettings holds what the kernel is told of an export, and what the device says.
func TestRemoteSettings(t *testing.T) {
	const base = wire.FlagHasFlags | wire.FlagSendFlush
	for name, tt := range map[string]struct {
		flags, want wire.Flags
		sizes       backends.BlockSizes
		o           Options
		block       uint64
		connections int
	}{
		"plain": {flags: base, want: base, block: 512, connections: 1},
		"more than the kernel knows": {
			flags: base | wire.FlagSendDF | wire.FlagSendCache | wire.FlagSendFastZero | wire.FlagSendTrim,
			want:  base | wire.FlagSendTrim, block: 512, connections: 1,
		},
		"read-only": {
			flags: base, want: base | wire.FlagReadOnly, o: Options{ReadOnly: true}, block: 512, connections: 1,
		},
		"several": {
			flags: base | wire.FlagCanMultiConn, want: base | wire.FlagCanMultiConn, o: Options{Connections: 3},
			block: 512, connections: 3,
		},
		"several that may not agree": {
			flags: base, want: base, o: Options{Connections: 3}, block: 512, connections: 1,
		},
		"blocks": {
			flags: base, want: base, sizes: backends.BlockSizes{Minimum: 4096}, block: 4096, connections: 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFarExport(t)
			f.flags, f.sizes = tt.flags, tt.sizes
			tt.o.Timeout, tt.o.DeadTimeout = 7*time.Second, 90*time.Second
			k, d := connectedFar(t, f, tt.o)
			got := k.Setting(d.Index())
			got.Identifier, got.ClientFlags = "", 0
			want := nbdnltest.Setting{
				Size: 1 << 20, BlockSize: tt.block, Timeout: 7, DeadConnTimeout: 90, ServerFlags: uint64(tt.want),
				Sockets: tt.connections,
			}
			if got != want {
				t.Errorf("the kernel has %+v, want %+v", got, want)
			}
			readOnly := tt.want&wire.FlagReadOnly != 0
			if d.BlockSize() != int(tt.block) || d.ReadOnly() != readOnly || d.Export() != nil ||
				d.Connections() != tt.connections || f.count() != tt.connections {
				t.Errorf("blocks of %d, read-only %t, %d connections, %d dialled",
					d.BlockSize(), d.ReadOnly(), d.Connections(), f.count())
			}
			for what, err := range map[string]error{
				"Resize": d.Resize(t.Context(), 1<<19), "Swap": d.Swap(t.Context(), newStore()),
			} {
				if !errors.Is(err, errors.ErrUnsupported) {
					t.Errorf("%s: %v", what, err)
				}
			}
			if err := d.Disconnect(t.Context()); err != nil || d.Err() != nil || d.State() != nbdnl.StateIdle {
				t.Errorf("ended with %v, %v, %s", err, d.Err(), d.State())
			}
			checkClean(t, k)
		})
	}
}

// TestRemoteRefused holds what the kernel can't speak with, and that nothing is left of it.
func TestRemoteRefused(t *testing.T) {
	lost := errors.New("no route")
	for name, tt := range map[string]struct {
		change func(*farExport)
		o      Options
		want   error // nil: any
	}{
		"empty": {change: func(f *farExport) { f.size = 0 }},
		"small blocks": {
			func(f *farExport) { f.sizes.Minimum = 4096 }, Options{BlockSize: 512}, errors.ErrUnsupported,
		},
		"short":         {func(f *farExport) { f.sizes.Maximum = 1024 }, Options{}, errors.ErrUnsupported},
		"away":          {func(f *farExport) { f.away = lost }, Options{}, lost},
		"half a sector": {change: func(*farExport) {}, o: Options{BlockSize: 256}},
		"many":          {change: func(*farExport) {}, o: Options{Connections: 257}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFarExport(t)
			tt.change(f)
			k, m, lab := labOn(t, nbdnltest.Options{})
			tt.o.Client = lab.Client
			d, err := m.connectRemote(t.Context(), anyIndex, f, tt.o)
			if d != nil || err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("%v, %v", d, err)
			}
			if n := k.Commands(nbdnltest.Connect); n != 0 {
				t.Errorf("%d connects", n)
			}
		})
	}
}

// TestRemoteReplaced holds that a connection that is lost is replaced, however long the server is
// away, and whatever its absence looks like; and that Outage tells of it.
func TestRemoteReplaced(t *testing.T) {
	f := newFarExport(t)
	k, d := connectedFar(t, f, Options{DeadTimeout: time.Second})
	if o := d.Outage(); o != (Outage{Alive: 1}) {
		t.Errorf("at first: %+v", o)
	}
	f.set(&net.OpError{Op: "dial", Err: os.ErrNotExist}) // as of a socket file that is missing
	before := time.Now()
	f.reset()
	f.await(t, d, 4)
	o := d.Outage()
	if o.Alive != 0 || o.Since.Before(before) || o.Err == nil || o.Replaced != 0 || d.State() != nbdnl.StateWaiting {
		t.Errorf("meanwhile: %+v, %s", o, d.State())
	}
	f.set(nil)
	awaitState(t, d, nbdnl.StateLive)
	if o := d.Outage(); o != (Outage{Alive: 1, Replaced: 1}) {
		t.Errorf("afterwards: %+v", o)
	}
	if n := k.Setting(d.Index()).Sockets; n != 1 || k.Dead(d.Index()) != 0 {
		t.Errorf("the kernel has %d connections, %d of them dead", n, k.Dead(d.Index()))
	}
	if err := d.Disconnect(t.Context()); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestRemoteEndedElsewhere holds that a device which somebody else disconnects has ended in order,
// also while its server is away.
func TestRemoteEndedElsewhere(t *testing.T) {
	for name, away := range map[string]error{"there": nil, "away": errors.New("no route")} {
		t.Run(name, func(t *testing.T) {
			f := newFarExport(t)
			k, d := connectedFar(t, f, Options{DeadTimeout: time.Hour})
			if away != nil {
				f.set(away)
				f.reset()
				f.await(t, d, 3)
			}
			if err := k.Client().Drop(t.Context(), d.Index(), d.Identifier()); err != nil {
				t.Fatal(err)
			}
			select {
			case <-d.Done():
			case <-time.After(10 * time.Second):
				t.Fatalf("it goes on: %s", d.State())
			}
			if d.Err() != nil || d.Loss() != nil || d.State() != nbdnl.StateIdle {
				t.Errorf("ended with %v, %v, %s", d.Err(), d.Loss(), d.State())
			}
			if away == nil && f.count() != 1 {
				t.Errorf("it took the end for a loss: %d connections were dialled", f.count())
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRemoteEnds holds that Close and Kick end the connection for the server, too.
func TestRemoteEnds(t *testing.T) {
	for name, end := range map[string]func(*Device) error{
		"Close": (*Device).Close,
		"Kick":  func(d *Device) error { return errors.Join(d.Kick(context.Background()), d.Close()) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFarExport(t)
			k, d := connectedFar(t, f, Options{DeadTimeout: time.Hour})
			if err := end(d); err != nil && name == "Close" {
				t.Error(err)
			}
			<-d.Done()
			_ = f.ends[0].SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.Copy(io.Discard, f.ends[0]); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the server's connection does not end")
			}
			checkClean(t, k)
		})
	}
}

// TestRemoteEndless holds that a set of connections to another server goes on trying when one of
// ours would have been given up, and leaves when the kernel says that the device has gone.
func TestRemoteEndless(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := setOf(1, time.Second, time.Second)
		s.remote = true
		s.refuse(&connectError{os.ErrNotExist})
		s.socket(0).end(errHungUp)
		<-time.After(time.Hour)
		s.check(t, "after an hour", nbdnl.StateWaiting, 0)
		if o := s.outage(); o.Err.Error() != os.ErrNotExist.Error() || time.Since(o.Since) != time.Hour {
			t.Errorf("it says %+v", o)
		}
		s.refuse(nil)
		<-time.After(2 * longestPause)
		s.check(t, "with the server", nbdnl.StateLive, 1)
		if len(s.misses) != 1 {
			t.Errorf("%d times writes may have been lost, want once", len(s.misses))
		}
		s.refuse(nbdnl.ErrNotConnected)
		s.socket(1).end(errHungUp)
		<-time.After(time.Second)
		s.check(t, "without the device", nbdnl.StateIdle, 0)
	})
}

// TestReconnectionSpread holds that pauses vary where others may have lost their connections at the
// same time.
func TestReconnectionSpread(t *testing.T) {
	took := make(map[time.Duration]bool)
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			begun, attempts := time.Now(), 0
			reconnection{
				attempt: func(context.Context) error {
					if attempts++; attempts < 5 {
						return errHungUp
					}
					return nil
				},
				spread: true,
				log:    slog.New(slog.DiscardHandler),
			}.run(t.Context())
			took[time.Since(begun)] = true
			if total := time.Since(begun); total < 112*time.Millisecond || total > 188*time.Millisecond {
				t.Errorf("4 pauses of 10 ms and up took %v", total)
			}
		})
	}
	if len(took) < 2 {
		t.Error("they are all alike")
	}
}
