package blockdev

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// poolOn returns a pool on a fake kernel, with the state directory of that.
func poolOn(t *testing.T, ko nbdnltest.Options, o PoolOptions) (*nbdnltest.Kernel, *Pool) {
	t.Helper()
	k, m, lab := labOn(t, ko)
	o.Client = lab.Client
	p, err := m.newPool(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return k, p
}

func (p *Pool) connected(t *testing.T) *Device {
	t.Helper()
	d, err := p.Connect(t.Context(), newStore(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// leased returns which indexes are leased, or were.
func leased(t *testing.T, p *Pool) []int {
	t.Helper()
	indexes, err := p.client.Claims().Leased()
	if err != nil {
		t.Fatal(err)
	}
	return indexes
}

// TestPool connects more devices than the module has made, and gives all indexes back.
func TestPool(t *testing.T) {
	k, p := poolOn(t, nbdnltest.Options{Devices: 2}, PoolOptions{Name: "mine", Warm: 3})
	if err := p.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := leased(t, p); !slices.Equal(got, []int{0, 1, 2}) {
		t.Errorf("ready: %v, want the two that exist and a new one", got)
	}
	var devices []*Device
	used := make(map[int]bool)
	for range 5 {
		d := p.connected(t)
		if used[d.Index()] {
			t.Errorf("index %d is used twice", d.Index())
		}
		used[d.Index()] = true
		if id := k.Setting(d.Index()).Identifier; id != d.Identifier() || id[:5] != "mine:" {
			t.Errorf("the kernel has the identifier %q", id)
		}
		devices = append(devices, d)
	}
	for _, d := range devices {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if got := leased(t, p); len(got) > 0 {
		t.Errorf("leases of %v are left", got)
	}
	if _, err := p.Connect(t.Context(), newStore(), Options{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	checkClean(t, k)
}

// TestPoolPrefers holds that of the indexes that are ready one is taken that had as many
// connections, and else the first.
func TestPoolPrefers(t *testing.T) {
	_, p := poolOn(t, nbdnltest.Options{}, PoolOptions{Max: 3, Warm: 3})
	connect := func(connections int) *Device {
		t.Helper()
		d, err := p.Connect(t.Context(), newStore(), Options{Connections: connections})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	if err := p.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	one, two, three := connect(1), connect(2), connect(3)
	for _, d := range []*Device{one, two, three} {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, tt := range []struct{ connections, want int }{{3, three.Index()}, {4, one.Index()}, {2, two.Index()}} {
		if d := connect(tt.connections); d.Index() != tt.want {
			t.Errorf("%d connections: index %d, want %d", tt.connections, d.Index(), tt.want)
		}
	}
}

// TestPoolAvoids holds that no index is taken that somebody has, whoever it is.
func TestPoolAvoids(t *testing.T) {
	k, p := poolOn(t, nbdnltest.Options{Devices: 6}, PoolOptions{})
	k.Mount(0, "/mnt")       // held, and not connected
	k.ConnectIoctl(1, 1<<20) // a stranger's
	_, m, o := k, p.machine, Options{Client: p.client}
	lone, err := m.connect(t.Context(), 2, newStore(), o) // this program's, not by the pool
	if err != nil {
		t.Fatal(err)
	}
	defer lone.Close()
	lease, err := p.client.Claims().TryLease(3) // another process, which has not connected it yet
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Release()
	corpse := p.connected(t) // one that is disconnected, and still held
	if corpse.Index() != 4 {
		t.Errorf("index %d, want the first that is free, 4", corpse.Index())
	}
	_, release := k.Hold(4)
	var busy *nbdnl.BusyError
	if err := corpse.Close(); !errors.As(err, &busy) {
		t.Errorf("Close: %v", err)
	}
	if d := p.connected(t); d.Index() != 5 {
		t.Errorf("index %d, want 5", d.Index())
	}
	if d := p.connected(t); d.Index() != 6 {
		t.Errorf("index %d, want a new one, 6", d.Index())
	}
	release()
	if d := p.connected(t); d.Index() != 4 {
		t.Errorf("index %d, want the one that was released, 4", d.Index())
	}
}

// TestPoolHusk holds that an index on which a device comes to its end is not kept ready, and that
// one which could not be disconnected stays for Reclaim.
func TestPoolHusk(t *testing.T) {
	k, p := poolOn(t, nbdnltest.Options{Devices: 3}, PoolOptions{Name: "mine", Max: 1, Warm: 1})
	husk := p.connected(t)
	_, release := k.Hold(husk.Index())
	var busy *nbdnl.BusyError
	if err := husk.Close(); !errors.As(err, &busy) || !busy.Disconnected {
		t.Errorf("Close: %v", err)
	}
	next := p.connected(t)
	if next.Index() == husk.Index() {
		t.Errorf("index %d, which is held", next.Index())
	}
	if note, err := p.client.Claims().TryLease(husk.Index()); err != nil || note.Left() != husk.Identifier() {
		t.Errorf("what is left of %s: %v, %v", husk.Identifier(), note, err)
	} else if err := note.Leave(); err != nil {
		t.Error(err)
	}
	release()
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	if n, err := p.Reclaim(t.Context()); err != nil {
		t.Errorf("reclaimed %v, %v", n, err)
	}
	if got := leased(t, p); len(got) > 1 { // the one that is ready
		t.Errorf("leases of %v are left", got)
	}
}

// TestPoolOpened has somebody open each index that was ready, as udev may: another one is taken,
// and in the end it is said who.
func TestPoolOpened(t *testing.T) {
	k, p := poolOn(t, nbdnltest.Options{Devices: 2}, PoolOptions{Warm: 2})
	if err := p.Fill(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, release := k.Hold(0)
	if d := p.connected(t); d.Index() != 1 {
		t.Errorf("index %d, want 1", d.Index())
	}
	release()
	for range 8 {
		k.Fail(nbdnltest.Connect, syscall.EBUSY)
		d := p.connected(t)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	k.Fail(nbdnltest.Connect, syscall.ENOMEM)
	if _, err := p.Connect(t.Context(), newStore(), Options{}); !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("error %v, want ENOMEM at once", err)
	}
}

// awaitWaiting returns when n calls of Connect wait for a device to end.
func awaitWaiting(t *testing.T, p *Pool, n int) {
	t.Helper()
	for limit := time.After(10 * time.Second); p.Stats().Waiting < n; {
		select {
		case <-time.After(time.Millisecond):
		case <-limit:
			t.Fatalf("%d wait, want %d", p.Stats().Waiting, n)
		}
	}
}

// TestPoolBounded holds that who finds the pool full is served in turn.
func TestPoolBounded(t *testing.T) {
	_, p := poolOn(t, nbdnltest.Options{}, PoolOptions{Max: 1})
	first := p.connected(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := p.Connect(ctx, newStore(), Options{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want that of the context", err)
	}
	var order []int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range 5 {
		wg.Go(func() {
			d, err := p.Connect(t.Context(), newStore(), Options{})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			order = append(order, i)
			mu.Unlock()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
		awaitWaiting(t, p, i+1)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	if !slices.Equal(order, []int{0, 1, 2, 3, 4}) {
		t.Errorf("served in the order %v", order)
	}
	last := p.connected(t)
	waiting := make(chan error)
	go func() {
		_, err := p.Connect(t.Context(), newStore(), Options{})
		waiting <- err
	}()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if err := <-waiting; !errors.Is(err, os.ErrClosed) {
		t.Errorf("who waits gets %v", err)
	}
	if err := last.Close(); err != nil {
		t.Errorf("a device that has outlived its pool: %v", err)
	}
}

// leave makes what is there when a process has died: a device whose connections are dead, and a
// lease that nobody holds.
func leave(t *testing.T, k *nbdnltest.Kernel, p *Pool, index int, noted, identifier string) *Device {
	t.Helper()
	lease, err := p.client.Claims().TryLease(index)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(lease.Note(noted), lease.Leave()); err != nil {
		t.Fatal(err)
	}
	d, err := p.machine.connect(t.Context(), index, newStore(), Options{Client: k.Client(), Identifier: identifier})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	d.conns.cut()
	return d
}

// TestPoolReclaim takes back what a dead process has left, and nothing else.
func TestPoolReclaim(t *testing.T) {
	k, p := poolOn(t, nbdnltest.Options{Devices: 8}, PoolOptions{Name: "mine"})
	leave(t, k, p, 0, "mine:dead", "mine:dead")
	leave(t, k, p, 1, "theirs:dead", "theirs:dead")
	leave(t, k, p, 2, "mine:earlier", "mine:later") // the index is another's by now
	leave(t, k, p, 3, "mine:held", "mine:held")
	unmount := k.Mount(3, "/mnt")
	leave(t, k, p, 5, "mine2:dead", "mine2:dead")
	leave(t, k, p, 6, "mine:too", "mine:too")
	leave(t, k, p, 7, "mine:as well", "mine:as well")
	k.FailSync(0, syscall.EIO) // What is cached has nowhere to go, and is not missed.
	alive := p.connected(t)
	if alive.Index() != 4 {
		t.Errorf("connected index %d, where something was left", alive.Index())
	}
	got, err := p.Reclaim(t.Context())
	var busy *nbdnl.BusyError
	if !slices.Equal(got, []int{0, 6, 7}) || !errors.As(err, &busy) || busy.Index != 3 ||
		errors.Is(err, nbdnl.ErrNotWritten) {
		t.Errorf("reclaimed %v, error %v, want 0, 6, 7, and that 3 is mounted", got, err)
	}
	for index, want := range map[int]bool{0: false, 1: true, 2: true, 3: true, 4: true, 5: true} {
		if connected := k.Setting(index).Sockets > 0; connected != want {
			t.Errorf("nbd%d is connected: %t", index, connected)
		}
	}
	if got := leased(t, p); !slices.Equal(got, []int{1, 3, 4, 5}) {
		t.Errorf("leases of %v", got)
	}
	unmount()
	if got, err := p.Reclaim(t.Context()); !slices.Equal(got, []int{3}) || err != nil {
		t.Errorf("reclaimed %v, error %v", got, err)
	}
	if isDone(alive) {
		t.Error("a living device was reclaimed")
	}
}

// TestPoolState holds that a state directory that can't be written stops a connect, with a reason.
func TestPoolState(t *testing.T) {
	k, p := poolOn(t, nbdnltest.Options{}, PoolOptions{})
	stateless(t, k)
	if _, err := p.Connect(t.Context(), newStore(), Options{}); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("error %v, want ENOTDIR", err)
	}
	checkClean(t, k)
}

// stateless puts a file where the state directory is to be.
func stateless(t *testing.T, k *nbdnltest.Kernel) {
	t.Helper()
	if err := os.MkdirAll(k.Path("run"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(k.Path("run/nbdctl"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
}
