package blockdev

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestPoolGoesOn holds that the search for a free index begins where the last one has ended.
func TestPoolGoesOn(t *testing.T) {
	_, p := poolOn(t, nbdnltest.Options{Devices: 3}, PoolOptions{})
	for _, want := range []int{0, 1, 2, 0} {
		d := p.connected(t)
		if d.Index() != want {
			t.Errorf("index %d, want %d", d.Index(), want)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestPoolLeaves holds that a search for a free index does not touch the lease of a device that is
// connected, and that what was noted of one that is held stays there for Reclaim.
func TestPoolLeaves(t *testing.T) {
	k, p := poolOn(t, nbdnltest.Options{}, PoolOptions{Name: "mine"})
	leave(t, k, p, 0, "mine:dead", "mine:dead").Close() // Its error is that of a connection that was cut.
	k.Hold(0)
	k.ConnectIoctl(1, size)
	leases := filepath.Join(string(p.client.Claims()), "leases")
	past := time.Unix(1, 0)
	if err := os.Chtimes(leases, past, past); err != nil {
		t.Fatal(err)
	}
	for index := range 2 {
		if lease, err := p.lease(t.Context(), index); lease != nil || err != nil {
			t.Errorf("lease of nbd%d: %v, %v", index, lease, err)
		}
	}
	if info, err := os.Stat(leases); err != nil || !info.ModTime().Equal(past) {
		t.Errorf("the lease of a device that is connected was taken, or one that was left given up: %v", err)
	}
	lease, err := p.client.Claims().TryLease(0)
	if err != nil {
		t.Fatal(err)
	}
	if lease.Left() != "mine:dead" {
		t.Errorf("%q is noted", lease.Left())
	}
	if err := lease.Release(); err != nil {
		t.Error(err)
	}
}

// A limited store takes requests of that many bytes.
type limited struct{ store }

func (limited) BlockSizes() backends.BlockSizes { return backends.BlockSizes{Maximum: 64 << 10} }

// TestPoolLimited holds that a backend's limit is kept on an index of which the settings were made
// before.
func TestPoolLimited(t *testing.T) {
	_, p := poolOn(t, nbdnltest.Options{}, PoolOptions{})
	d, err := p.Connect(t.Context(), limited{newStore()}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if kb, err := p.machine.number(d.Index(), "max_sectors_kb"); kb != 64 {
		t.Errorf("%d KiB, %v", kb, err)
	}
}
