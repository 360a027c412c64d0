package blockdev

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

const size = 1 << 20

// A store is a backend that can do everything and keeps nothing: no request reaches it on a fake
// kernel.
type store struct {
	*bytes.Reader
	io.WriterAt
	minimum int
}

func (store) Sync() error                                   { return nil }
func (store) Trim(off, n int64) error                       { return nil }
func (store) Zero(off, n int64, _ backends.ZeroFlags) error { return nil }
func (s store) BlockSizes() backends.BlockSizes             { return backends.BlockSizes{Minimum: s.minimum} }

func newStore() store { return store{Reader: bytes.NewReader(make([]byte, size))} }

// lab is a machine with a fake kernel, whose devices are always readable.
func lab(t *testing.T) (*nbdnltest.Kernel, machine, Options) {
	return labOn(t, nbdnltest.Options{})
}

func labOn(t *testing.T, o nbdnltest.Options) (*nbdnltest.Kernel, machine, Options) {
	k := nbdnltest.New(t, o)
	m := machine{
		first:  func(context.Context, string, string, int) error { return nil },
		system: k.System(),
	}
	return k, m, Options{Client: k.Client()}
}

// checkClean fails the test unless no device is connected, within a moment.
func checkClean(t *testing.T, k *nbdnltest.Kernel) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for index := range 16 {
		for k.Setting(index).Sockets > 0 {
			if time.Now().After(deadline) {
				t.Fatalf("nbd%d is still connected", index)
			}
			<-time.After(time.Millisecond)
		}
	}
}

// TestSettings holds what the kernel is told, and what the device says of itself.
func TestSettings(t *testing.T) {
	tests := []struct {
		name string
		b    backends.Backend
		o    Options
		want nbdnltest.Setting
	}{
		{"defaults", newStore(), Options{}, nbdnltest.Setting{
			Size: size, BlockSize: 512, Timeout: 30, Sockets: 1, ServerFlags: 1 | 4 | 8 | 32 | 64 | 256,
		}},
		{"everything", newStore(), Options{
			BlockSize: 4096, Connections: 3, Timeout: 7 * time.Second, DeadTimeout: 9 * time.Second,
			ReadOnly: true, Identifier: "mine",
		}, nbdnltest.Setting{
			Size: size, BlockSize: 4096, Timeout: 7, DeadConnTimeout: 9, Sockets: 3,
			ServerFlags: 1 | 2 | 256, Identifier: "mine",
		}},
		{"a reader", bytes.NewReader(make([]byte, size)), Options{}, nbdnltest.Setting{
			Size: size, BlockSize: 512, Timeout: 30, Sockets: 1, ServerFlags: 1 | 2 | 256,
		}},
		{"a backend that needs large blocks", store{
			Reader: bytes.NewReader(make([]byte, size)), minimum: 2048,
		}, Options{}, nbdnltest.Setting{
			Size: size, BlockSize: 2048, Timeout: 30, Sockets: 1, ServerFlags: 1 | 4 | 8 | 32 | 64 | 256,
		}},
		{"zeroes are the kernel's work where the backend has no way of its own", struct {
			backends.Backend
			io.WriterAt
		}{Backend: newStore()}, Options{}, nbdnltest.Setting{
			Size: size, BlockSize: 512, Timeout: 30, Sockets: 1, ServerFlags: 1 | 4 | 8 | 256,
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, m, o := lab(t)
			tt.o.Client = o.Client
			d, err := m.connect(t.Context(), anyIndex, tt.b, tt.o)
			if err != nil {
				t.Fatal(err)
			}
			got := k.Setting(d.Index())
			if tt.want.Identifier == "" {
				tt.want.Identifier = d.Identifier()
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("setting (-want +got):\n%s", diff)
			}
			if d.Size() != size || d.BlockSize() != int(got.BlockSize) || d.Connections() != got.Sockets ||
				len(d.Stats()) != got.Sockets || d.ReadOnly() != (got.ServerFlags&2 != 0) ||
				d.Path() != nbdnl.Path(d.Index()) || d.Err() != nil {
				t.Errorf("the device says %d bytes in blocks of %d over %d connections, read-only %t, at %s, error %v",
					d.Size(), d.BlockSize(), d.Connections(), d.ReadOnly(), d.Path(), d.Err())
			}
			if err := d.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			<-d.Done()
			if d.Err() != nil {
				t.Errorf("ended with %v", d.Err())
			}
			if k.Syncs(d.Index()) == 0 {
				t.Error("what is cached was not written")
			}
			checkClean(t, k)
		})
	}
}

func TestDefaultIdentifier(t *testing.T) {
	prefix, id, ok := strings.Cut(Options{}.complete(0).Identifier, ":")
	if !ok || prefix != filepath.Base(os.Args[0]) || len(id) != 36 {
		t.Errorf("identifier %q:%q, want the program's name and a UUID", prefix, id)
	}
}

// TestRefused holds that what can never work fails with its reason before the kernel is asked.
func TestRefused(t *testing.T) {
	tests := []struct {
		name    string
		b       backends.Backend
		o       Options
		problem string
	}{
		{"no backend", nil, Options{}, "no backend"},
		{"no bytes", bytes.NewReader(nil), Options{}, "size 0"},
		{"a tail", bytes.NewReader(make([]byte, 1000)), Options{}, "not a multiple of the block size, 512"},
		{"small blocks", newStore(), Options{BlockSize: 256}, "at least 512"},
		{"odd blocks", newStore(), Options{BlockSize: 1000}, "power of two"},
		{
			"blocks below the backend's", store{Reader: newStore().Reader, minimum: 4096},
			Options{BlockSize: 512}, "backend needs",
		},
		{"negative connections", newStore(), Options{Connections: -1}, "connections"},
		{"too many connections", newStore(), Options{Connections: 1000}, "connections"},
		{"part of a second", newStore(), Options{Timeout: time.Millisecond}, "whole seconds"},
		{"negative dead timeout", newStore(), Options{DeadTimeout: -time.Second}, "dead connection timeout"},
		{"unprintable identifier", newStore(), Options{Identifier: "a\nb"}, "control character"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, m, o := lab(t)
			k.Fail(nbdnltest.Connect, syscall.EXDEV) // Would be seen.
			tt.o.Client = o.Client
			_, err := m.connect(t.Context(), anyIndex, tt.b, tt.o)
			if err == nil || !strings.Contains(err.Error(), tt.problem) {
				t.Errorf("error %v, want one about %q", err, tt.problem)
			}
			checkClean(t, k)
		})
	}
	if _, err := ConnectIndex(t.Context(), -1, newStore(), Options{}); err == nil {
		t.Error("a negative index was taken")
	}
}

// TestFailedConnect lets each step of a connect fail. The cause must come out, and nothing may be
// left.
func TestFailedConnect(t *testing.T) {
	cause := errors.New("no such luck")
	tests := []struct {
		name  string
		setup func(t *testing.T, k *nbdnltest.Kernel, m *machine, cancel context.CancelCauseFunc)
		want  error
	}{
		{
			name: "the context has ended",
			setup: func(_ *testing.T, _ *nbdnltest.Kernel, _ *machine, cancel context.CancelCauseFunc) {
				cancel(cause)
			},
			want: cause,
		},
		{
			name: "no privilege",
			setup: func(_ *testing.T, k *nbdnltest.Kernel, _ *machine, _ context.CancelCauseFunc) {
				k.Fail(nbdnltest.Connect, syscall.EPERM)
			},
			want: os.ErrPermission,
		},
		{
			name: "no memory",
			setup: func(_ *testing.T, k *nbdnltest.Kernel, _ *machine, _ context.CancelCauseFunc) {
				k.Fail(nbdnltest.Connect, syscall.ENOMEM)
			},
			want: syscall.ENOMEM,
		},
		{
			name: "the context ends in the connect",
			setup: func(_ *testing.T, k *nbdnltest.Kernel, _ *machine, cancel context.CancelCauseFunc) {
				unblock := k.Block(nbdnltest.Connect)
				time.AfterFunc(20*time.Millisecond, func() { cancel(cause); unblock() })
			},
			want: cause,
		},
		{
			name: "no device node",
			setup: func(_ *testing.T, _ *nbdnltest.Kernel, m *machine, _ context.CancelCauseFunc) {
				m.first = func(context.Context, string, string, int) error { return os.ErrNotExist }
			},
			want: os.ErrNotExist,
		},
		{
			name: "the first block can't be read",
			setup: func(_ *testing.T, _ *nbdnltest.Kernel, m *machine, _ context.CancelCauseFunc) {
				m.first = func(context.Context, string, string, int) error { return syscall.EIO }
			},
			want: syscall.EIO,
		},
		{
			name: "the context ends in the open",
			setup: func(t *testing.T, k *nbdnltest.Kernel, m *machine, cancel context.CancelCauseFunc) {
				m.first = func(ctx context.Context, path, number string, n int) error {
					// As in the kernel, only the disconnect ends the open.
					cancel(cause)
					for k.Setting(0).Sockets > 0 {
						<-time.After(time.Millisecond)
					}
					// Another open would queue up behind this one.
					if n := k.Syncs(0); n > 0 {
						t.Errorf("it was opened and synced %d times", n)
					}
					return syscall.EIO
				}
			},
			want: cause,
		},
		{
			name: "somebody disconnects it in the open",
			setup: func(t *testing.T, k *nbdnltest.Kernel, m *machine, _ context.CancelCauseFunc) {
				other := k.Client()
				m.first = func(ctx context.Context, path, number string, n int) error {
					if err := other.DropAny(ctx, 0); err != nil {
						t.Error(err)
					}
					<-time.After(20 * time.Millisecond)
					return syscall.EIO
				}
			},
			want: nbdnl.ErrNotConnected,
		},
		{
			name: "somebody disconnects it between open and read",
			setup: func(t *testing.T, k *nbdnltest.Kernel, m *machine, _ context.CancelCauseFunc) {
				other := k.Client()
				m.first = func(ctx context.Context, path, number string, n int) error {
					if err := other.DropAny(ctx, 0); err != nil {
						t.Error(err)
					}
					return io.EOF
				}
			},
			want: nbdnl.ErrNotConnected,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, m, o := lab(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			tt.setup(t, k, &m, cancel)
			d, err := m.connect(ctx, anyIndex, newStore(), o)
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if d != nil {
				t.Error("a device along with an error")
			}
			checkClean(t, k)
		})
	}
}

// TestCancelledAnyTime ends the context at many moments of a connect: either there is a device, or
// nothing.
func TestCancelledAnyTime(t *testing.T) {
	k, m, o := lab(t)
	whole := time.Duration(0) // what the latest complete connect took
	var connected, cancelled int
	for i := range 100 {
		start, limit := time.Now(), time.Hour
		if whole > 0 {
			limit = whole * time.Duration(i) / 80
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		d, err := m.connect(ctx, anyIndex, newStore(), o)
		cancel()
		switch {
		case err == nil:
			connected++
			whole = time.Since(start)
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		case errors.Is(err, context.DeadlineExceeded):
			cancelled++
		default:
			t.Error(err)
		}
		checkClean(t, k)
	}
	if connected == 0 || cancelled == 0 {
		t.Errorf("%d connected, %d cancelled: one half of the test did not take place", connected, cancelled)
	}
}

// TestIndex holds that a device gets the index asked for, waits for a passing opener, and not for a
// lasting one.
func TestIndex(t *testing.T) {
	k, m, o := lab(t)
	d, err := m.connect(t.Context(), 5, newStore(), o)
	if err != nil {
		t.Fatal(err)
	}
	if d.Index() != 5 {
		t.Errorf("index %d, want 5", d.Index())
	}
	if _, err := m.connect(t.Context(), 5, newStore(), o); !errors.Is(err, nbdnl.ErrBusy) {
		t.Errorf("a device in use: %v, want ErrBusy", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	_, release := k.Hold(5)
	var released atomic.Bool
	time.AfterFunc(100*time.Millisecond, func() { released.Store(true); release() })
	d, err = m.connect(t.Context(), 5, newStore(), o)
	if err != nil {
		t.Fatalf("a device that was open for a moment: %v", err)
	}
	if !released.Load() {
		t.Error("connected while somebody had it open")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, k)
}
