package blockdev

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestHandOverLease has a device of a pool go to another process: nobody can lease its index at any
// moment.
func TestHandOverLease(t *testing.T) {
	k, m, o := labOn(t, nbdnltest.Options{})
	p, err := m.newPool(PoolOptions{Name: "old", Client: o.Client})
	if err != nil {
		t.Fatal(err)
	}
	old, err := p.Connect(t.Context(), newElastic(), Options{DeadTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	leased := func() {
		t.Helper()
		if l, err := o.Client.Claims().TryLease(old.Index()); !errors.Is(err, nbdnl.ErrBusy) {
			t.Errorf("the index can be leased: %v, %v", l, err)
		}
	}
	pass := func(b backends.Backend) (*Device, error) {
		ours, theirs := passage(t)
		handed := make(chan error, 1)
		go func() { handed <- old.HandOverTo(t.Context(), ours, HandOverOptions{}) }()
		next, err := m.takeOverFrom(t.Context(), theirs, opens(b), o)
		return next, errors.Join(err, <-handed)
	}
	if _, err := pass(&fitting{store: newStore(), size: size / 2}); err == nil {
		t.Error("another backend was taken")
	}
	leased()
	next, err := pass(newElastic())
	if err := errors.Join(err, p.Close()); err != nil {
		t.Fatal(err)
	}
	leased()
	h, err := next.HandOver(t.Context(), HandOverOptions{})
	if err != nil || !h.Document.Leased || len(h.Files) != 2 {
		t.Fatalf("handed over again: %v", err)
	}
	h.Resume()
	leased()
	if left, err := p.Left(t.Context()); len(left) > 0 || err != nil {
		t.Errorf("left behind are %v: %v", left, err)
	}
	if s := p.Stats(); s.InUse != 0 {
		t.Errorf("the pool has %+v", s)
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
	if got, err := o.Client.Claims().Leased(); len(got) > 0 || err != nil {
		t.Errorf("leased are %v: %v", got, err)
	}
}

// TestHandOverReplacing has a device that is about to replace a connection: a handover waits for
// that, and one that was given up leaves it as it was.
func TestHandOverReplacing(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 2)
	d := o.adopt(t)
	live := func() {
		t.Helper()
		for d.State() != nbdnl.StateLive {
			select {
			case <-d.Changes():
			case <-d.Done():
				t.Fatal(d.Err())
			}
		}
	}
	unblock := o.Block(nbdnltest.Reconfigure)
	o.hangUp(t, 0)
	for o.Commands(nbdnltest.Reconfigure) == 0 {
		<-time.After(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := d.HandOver(ctx, HandOverOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("beside a replacement: %v", err)
	}
	replaced := func(n int64) {
		t.Helper()
		for d.Outage().Replaced < n {
			<-d.Changes()
		}
		live()
	}
	unblock()
	replaced(1)
	o.hangUp(t, 1)
	replaced(2)

	o.Fail(nbdnltest.Reconfigure, syscall.ENOMEM)
	d.lose(0)
	for d.Alive() != 1 {
		<-d.Changes()
	}
	h, err := d.HandOver(t.Context(), HandOverOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n := o.Commands(nbdnltest.Reconfigure)
	<-time.After(100 * time.Millisecond) // The next attempt is made, and waits.
	if more := o.Commands(nbdnltest.Reconfigure) - n; more != 0 {
		t.Errorf("%d attempts in a handover", more)
	}
	o.Fail(nbdnltest.Reconfigure, 0)
	h.Resume()
	replaced(3)
}

// TestHandOverLeaseLost has no copy to be had of a descriptor: the device goes on here.
func TestHandOverLeaseLost(t *testing.T) {
	o := orphaned(t, nbdnltest.Options{}, 1)
	d := o.adopt(t)
	lease, err := o.options.Client.Claims().TryLease(9)
	if err := errors.Join(err, lease.Release()); err != nil {
		t.Fatal(err)
	}
	d.lease = lease
	if _, err := d.HandOver(t.Context(), HandOverOptions{}); err == nil || !strings.Contains(err.Error(), "lease") {
		t.Errorf("with a lease that is closed: %v", err)
	}
	read(t, o.kernel[0])
}

// A syncing backend counts syncs, of which some fail.
type syncing struct {
	*elastic
	syncs int
	fail  func(n int) error
}

func (s *syncing) Sync() error {
	s.syncs++
	return s.fail(s.syncs)
}

// TestHandOverSync holds that the backend is synced before, and once more when nothing is asked of
// it, unless there is no need; and that one which can't be keeps the device, with a loss.
func TestHandOverSync(t *testing.T) {
	boom := errors.New("boom")
	o := orphaned(t, nbdnltest.Options{}, 1)
	bad := 0
	b := &syncing{elastic: newElastic(), fail: func(n int) error {
		if n == bad {
			return boom
		}
		return nil
	}}
	d, err := o.machine.adopt(t.Context(), o.e, b, o.options, nil, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, tt := range []struct {
		bad, syncs int
		unsynced   bool
	}{{0, 2, false}, {0, 0, true}, {1, 1, false}, {2, 2, false}, {1, 0, true}} {
		bad, b.syncs = tt.bad, 0
		h, err := d.HandOver(t.Context(), HandOverOptions{Unsynced: tt.unsynced})
		if tt.bad > 0 && !tt.unsynced {
			if !errors.Is(err, boom) || !errors.Is(d.Loss(), boom) {
				t.Errorf("%+v: %v, the loss is %v", tt, err, d.Loss())
			}
		} else if err != nil {
			t.Errorf("%+v: %v", tt, err)
		} else {
			if n := h.Document.Connections[0].Stats.InFlight; n != 0 {
				t.Errorf("%d requests are in flight", n)
			}
			h.Resume()
		}
		if b.syncs != tt.syncs {
			t.Errorf("%+v: %d syncs", tt, b.syncs)
		}
		read(t, o.kernel[0])
	}
	d.losses.excuse()
	d.Acknowledge(d.Loss().(*LossError).Number)
}
