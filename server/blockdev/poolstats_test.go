package blockdev

import (
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// wantStats waits until the pool is doing that.
func wantStats(t *testing.T, p *Pool, want PoolStats) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	patience := time.After(10 * time.Second)
	for p.Stats() != want {
		select {
		case <-tick.C:
		case <-patience:
			t.Fatalf("stats are %+v, want %+v", p.Stats(), want)
		}
	}
}

// TestPoolStats follows a pool from the first index that is ready to the last device that ends.
func TestPoolStats(t *testing.T) {
	_, warm := poolOn(t, nbdnltest.Options{}, PoolOptions{Warm: 2})
	wantStats(t, warm, PoolStats{Ready: 2})
	if err := warm.Close(); err != nil {
		t.Error(err)
	}
	wantStats(t, warm, PoolStats{})

	_, p := poolOn(t, nbdnltest.Options{}, PoolOptions{Max: 2})
	a, b := p.connected(t), p.connected(t)
	wantStats(t, p, PoolStats{InUse: 2})
	ctx, cancel := context.WithCancel(t.Context())
	given := make(chan error, 1)
	go func() {
		_, err := p.Connect(ctx, newStore(), Options{})
		given <- err
	}()
	wantStats(t, p, PoolStats{InUse: 2, Waiting: 1})
	cancel()
	if err := <-given; !errors.Is(err, context.Canceled) {
		t.Errorf("who waited gets %v", err)
	}
	wantStats(t, p, PoolStats{InUse: 2})
	for _, d := range []*Device{a, b} {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	wantStats(t, p, PoolStats{})
}

// TestPoolWait waits for the last device, and says how many there are when it can't.
func TestPoolWait(t *testing.T) {
	_, p := poolOn(t, nbdnltest.Options{}, PoolOptions{Name: "mine"})
	if err := p.Wait(t.Context()); err != nil {
		t.Errorf("with no device: %v", err)
	}
	a, b := p.connected(t), p.connected(t)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	err := p.Wait(ended)
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "pool mine has 2 devices in use") {
		t.Errorf("error %v, want that of the context, and 2 devices", err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	waited := make(chan int, 1)
	go func() {
		if err := p.Wait(t.Context()); err != nil {
			t.Error(err)
		}
		waited <- p.Stats().InUse
	}()
	for _, d := range []*Device{a, b} {
		select {
		case <-waited:
			t.Fatalf("it does not wait for %s", d.Path())
		default:
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if left := <-waited; left != 0 {
		t.Errorf("%d devices are in use after it", left)
	}
	if err := p.Wait(ended); err != nil {
		t.Errorf("once more, with a context that has ended: %v", err)
	}
}

// TestPoolOnError tells why no index can be kept ready, every time.
func TestPoolOnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, m, lab := labOn(t, nbdnltest.Options{})
		stateless(t, k)
		told := make(chan error)
		p, err := m.newPool(PoolOptions{
			Name:    "mine",
			Warm:    1,
			Client:  lab.Client,
			OnError: func(err error) { told <- err },
		})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := <-told; !errors.Is(err, syscall.ENOTDIR) || !strings.Contains(err.Error(), "pool mine") {
				t.Errorf("told %v, want ENOTDIR", err)
			}
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestPoolLeft lists what Reclaim would take, and leaves it.
func TestPoolLeft(t *testing.T) {
	k, p := poolOn(t, nbdnltest.Options{Devices: 8}, PoolOptions{Name: "mine"})
	leave(t, k, p, 0, "mine:dead", "mine:dead")
	leave(t, k, p, 1, "theirs:dead", "theirs:dead")
	leave(t, k, p, 2, "mine:earlier", "mine:later") // the index is another's by now
	leave(t, k, p, 3, "mine:held", "mine:held")
	k.Mount(3, "/mnt")
	leave(t, k, p, 4, "mine:gone", "mine:gone").Close() // Its error is that of a connection that was cut.
	p.connected(t)
	before := leased(t, p)
	for range 2 { // The first does not change what the second finds.
		left, err := p.Left(t.Context())
		if err != nil {
			t.Error(err)
		}
		var got []nbdnl.Status
		for _, s := range left {
			got = append(got, nbdnl.Status{
				Index:      s.Index,
				Identifier: s.Identifier,
				Size:       s.Size,
				BlockSize:  s.BlockSize,
				State:      s.State,
			})
		}
		want := []nbdnl.Status{
			{Index: 0, Identifier: "mine:dead", Size: newStore().Size(), BlockSize: 512, State: nbdnl.StateOrphaned},
			{Index: 3, Identifier: "mine:held", Size: newStore().Size(), BlockSize: 512, State: nbdnl.StateOrphaned},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("left (-want +got):\n%s", diff)
		}
	}
	if diff := cmp.Diff(before, leased(t, p)); diff != "" {
		t.Errorf("leases (-before +after):\n%s", diff)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if left, err := p.Left(ctx); len(left) > 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of the context: %v, %v", left, err)
	}
}

// TestPoolLeftUnknown holds that a kernel which keeps no identifiers leaves no doubt that it can't
// be told.
func TestPoolLeftUnknown(t *testing.T) {
	k, p := poolOn(t, nbdnltest.Options{Release: "5.10.0"}, PoolOptions{Name: "mine"})
	leave(t, k, p, 0, "mine:dead", "mine:dead")
	if left, err := p.Left(t.Context()); len(left) > 0 || !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("left %v, error %v, want ErrUnsupported", left, err)
	}
}

// TestPoolClient holds that the client of a pool stays open for devices that outlive it, and no
// longer.
func TestPoolClient(t *testing.T) {
	_, p := poolOn(t, nbdnltest.Options{}, PoolOptions{Name: "mine"})
	p.ownsClient = true // as if nobody had given it one
	d := p.connected(t)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.client.Status(t.Context(), d.Index()); err != nil {
		t.Errorf("with a device in use: %v", err)
	}
	if err := d.Disconnect(t.Context()); err != nil {
		t.Errorf("Disconnect of a device that has outlived its pool: %v", err)
	}
	if _, err := p.client.Status(t.Context(), d.Index()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after the last device: %v, want a client that is closed", err)
	}
}
