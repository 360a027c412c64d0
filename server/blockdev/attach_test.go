package blockdev

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// abandoned connects a device whose server is dead.
func abandoned(t *testing.T, ko nbdnltest.Options, connections int) (*orphan, nbdnl.Status) {
	t.Helper()
	o := orphaned(t, ko, connections)
	closeLinks(o.e.links)
	left, err := o.options.Client.Status(t.Context(), o.e.index)
	if err != nil {
		t.Fatal(err)
	}
	for i := range connections {
		if err := os.MkdirAll(o.Path("sys/block/nbd3/mq/"+string(rune('0'+i))), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	o.options.Timeout, o.options.DeadTimeout = 5*time.Second, time.Minute
	return o, left
}

func (o *orphan) attach(ctx context.Context, left nbdnl.Status, b *fitting) (*Device, error) {
	return o.machine.attach(ctx, left, b.backend(), o.options, nil, func() error { return nil })
}

// TestAttach goes on with a device whose server is dead, with the timeouts that are asked for.
func TestAttach(t *testing.T) {
	for _, connections := range []int{1, 3} {
		o, left := abandoned(t, nbdnltest.Options{}, connections)
		d, err := o.attach(t.Context(), left, &fitting{store: newStore(), size: size})
		if err != nil {
			t.Fatal(err)
		}
		set := o.Setting(3)
		if o.Dead(3) != 0 || set.Sockets != connections || set.Timeout != 5 || set.DeadConnTimeout != 60 {
			t.Errorf("%d connections are dead, the kernel has %+v", o.Dead(3), set)
		}
		if d.State() != nbdnl.StateLive || d.Connections() != connections || d.Index() != 3 ||
			d.Identifier() != "left:1" || d.Size() != size || d.ReadOnly() || d.Timeout() != 5*time.Second {
			t.Errorf("%v, %d connections, nbd%d, %q", d.State(), d.Connections(), d.Index(), d.Identifier())
		}
		if err := d.Disconnect(t.Context()); err != nil {
			t.Error(err)
		}
		checkClean(t, o.Kernel)
	}
}

// TestAttachRefused holds what is no rightful backend, and that the device waits for the right one.
func TestAttachRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(o *orphan, left *nbdnl.Status, b *fitting)
		want   string // what differs
		says   string
	}{
		"identifier":   {func(_ *orphan, s *nbdnl.Status, _ *fitting) { s.Identifier = "x" }, "identifier", ""},
		"size":         {func(_ *orphan, _ *nbdnl.Status, b *fitting) { b.size *= 2 }, "backend size", ""},
		"was resized":  {func(_ *orphan, s *nbdnl.Status, b *fitting) { s.Size, b.size = 512, 512 }, "size", ""},
		"without trim": {func(_ *orphan, _ *nbdnl.Status, b *fitting) { b.plain = true }, "backend trim", ""},
		"is gone":      {func(_ *orphan, s *nbdnl.Status, _ *fitting) { s.Index = 4 }, "state", ""},
		"read-only": {func(_ *orphan, s *nbdnl.Status, _ *fitting) { s.ReadOnly = true },
			"read-only, backend flush, backend fua, backend trim", ""},
		"no identifiers": {func(_ *orphan, s *nbdnl.Status, _ *fitting) { s.HasIdentifier = false }, "",
			"shows no identifier"},
		"no wait": {func(o *orphan, _ *nbdnl.Status, _ *fitting) { o.options.DeadTimeout = 0 }, "",
			"without Options.DeadTimeout"},
	} {
		t.Run(name, func(t *testing.T) {
			o, left := abandoned(t, nbdnltest.Options{}, 1)
			was, b, options := left, &fitting{store: newStore(), size: size}, o.options
			before := o.Setting(3)
			tt.change(o, &left, b)
			d, err := o.attach(t.Context(), left, b)
			if d != nil || err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("%v, %v", d, err)
			}
			if diff := cmp.Diff(tt.want, strings.Join(mismatches(err), ", ")); diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
			if diff := cmp.Diff(before, o.Setting(3)); diff != "" || o.Dead(3) != 1 {
				t.Errorf("the device was touched (-want +got):\n%s", diff)
			}
			o.options = options
			if d, err = o.attach(t.Context(), was, &fitting{store: newStore(), size: size}); err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			checkClean(t, o.Kernel)
		})
	}
}

// A zeroless backend has no Zero.
type zeroless struct{ *elastic }

func (zeroless) Caps() backends.Caps { return ^backends.CapZero }

// TestAttachZeroes goes on with a device that sends zeroes, with a backend that has none of its
// own: the server writes them.
func TestAttachZeroes(t *testing.T) {
	o, left := abandoned(t, nbdnltest.Options{}, 1)
	left.Flags |= nbdnl.FlagSendWriteZeroes
	none := func() error { return nil }
	d, err := o.machine.attach(t.Context(), left, zeroless{newElastic()}, o.options, nil, none)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// TestAttachServed holds that a device with a server that lives is not taken from it.
func TestAttachServed(t *testing.T) {
	k, old := connectedWith(t, nbdnltest.Options{}, newElastic(), Options{DeadTimeout: time.Minute})
	left, err := old.client.Status(t.Context(), old.Index())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	d, err := old.machine.attach(ctx, left, newElastic(), Options{Client: old.client, DeadTimeout: time.Minute}, nil,
		func() error { return nil })
	if d != nil || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, %v", d, err)
	}
	if old.State() != nbdnl.StateLive || k.Dead(old.Index()) != 0 {
		t.Errorf("the device is %v", old.State())
	}
	if err := old.Disconnect(t.Context()); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestPoolAttach has a pool go on with what another process of its name has left.
func TestPoolAttach(t *testing.T) {
	o, left := abandoned(t, nbdnltest.Options{}, 1)
	claims := o.options.Client.Claims()
	p, err := o.machine.newPool(PoolOptions{Name: "left", Client: o.options.Client})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := p.Attach(t.Context(), left, newElastic(), o.options); !errors.Is(err, nbdnl.ErrBusy) {
		t.Errorf("without a lease: %v", err)
	}
	lease, err := claims.TryLease(3)
	if err != nil {
		t.Fatal(err)
	}
	if err := lease.Note("left:x"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Attach(t.Context(), left, newElastic(), o.options); !errors.Is(err, nbdnl.ErrBusy) {
		t.Errorf("leased by another process: %v", err)
	}
	if err := lease.Leave(); err != nil {
		t.Fatal(err)
	}
	_, err = p.Attach(t.Context(), left, newElastic(), o.options)
	if diff := cmp.Diff([]string{"identifier"}, mismatches(err)); diff != "" {
		t.Errorf("another device of the pool: %v", err)
	}
	if s := p.Stats(); s.InUse != 0 {
		t.Errorf("the pool has %+v", s)
	}
	l, err := claims.TryLease(3)
	if err != nil || l.Left() != "left:x" {
		t.Fatalf("the lease is not left: %v", err)
	}
	if err := errors.Join(l.Note("left:1"), l.Leave()); err != nil {
		t.Error(err)
	}
	gone, err := claims.TryLease(9)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(gone.Note("left:gone"), gone.Leave()); err != nil {
		t.Error(err)
	}
	all, err := p.Left(t.Context())
	if got, err := claims.Leased(); !slices.Equal(got, []int{3}) {
		t.Errorf("leased are %v: %v", got, err)
	}
	if err != nil || len(all) != 1 {
		t.Fatalf("left behind are %v: %v", all, err)
	}
	d, err := p.Attach(t.Context(), all[0], newElastic(), o.options)
	if err != nil {
		t.Fatal(err)
	}
	if s := p.Stats(); s.InUse != 1 || d.State() != nbdnl.StateLive {
		t.Errorf("the pool has %+v, the device is %v", s, d.State())
	}
	if all, err := p.Left(t.Context()); len(all) > 0 || err != nil {
		t.Errorf("left behind are %v: %v", all, err)
	}
	if err := d.Disconnect(t.Context()); err != nil {
		t.Error(err)
	}
	if s := p.Stats(); s.InUse != 0 {
		t.Errorf("the pool has %+v", s)
	}
	if got, err := claims.Leased(); len(got) > 0 || err != nil {
		t.Errorf("leased are %v: %v", got, err)
	}
	checkClean(t, o.Kernel)
}
