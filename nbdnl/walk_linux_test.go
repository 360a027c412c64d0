package nbdnl_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/holder"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// A toll is where every walk through the processes comes by: it counts them, and lets none pass
// before it is told.
type toll struct {
	gate  chan struct{}
	walks int // read when no walk is under way
}

// tolled returns the kernel's system with a toll at a process that has a device open which nobody
// asks about.
func tolled(k *nbdnltest.Kernel, spare int) (nbdnl.System, *toll) {
	pid, _ := k.Hold(spare)
	post := k.Path(fmt.Sprintf("proc/%d/fd/3", pid))
	system := k.System()
	number := system.DeviceNumber
	b := &toll{gate: make(chan struct{})}
	system.DeviceNumber = func(path string) (string, bool) {
		if path == post {
			b.walks++
			<-b.gate
		}
		return number(path)
	}
	return system, b
}

// pass lets walks pass, each when all others have done what they can, until done is closed.
func (b *toll) pass(done <-chan struct{}) {
	for {
		synctest.Wait()
		select {
		case b.gate <- struct{}{}:
		case <-done:
			return
		case <-time.After(time.Millisecond): // nobody walks: they wait for something else
		}
	}
}

// TestFindAll finds the holders of many devices in one walk, each with its own device.
func TestFindAll(t *testing.T) {
	k := nbdnltest.New(t, nbdnltest.Options{})
	system, b := tolled(k, 15)
	close(b.gate)
	k.Hold(1)
	k.Hold(1)
	k.Mount(2, "/mnt")
	k.Partition(3, 1)
	if err := errors.Join(os.MkdirAll(k.Path("sys/block/nbd3/nbd3p1/holders"), 0o755),
		os.WriteFile(k.Path("sys/block/nbd3/nbd3p1/holders/md7"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	check := func(name string, f *holder.Finder) {
		t.Helper()
		b.walks = 0
		found, err := f.FindAll(t.Context(), 0, 1, 2, 3, 99)
		if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "nbd99") {
			t.Errorf("%s: error %v, want that there is no nbd99", name, err)
		}
		if b.walks != 1 {
			t.Errorf("%s: %d walks, want 1", name, b.walks)
		}
		if got := slices.Sorted(maps.Keys(found)); !slices.Equal(got, []int{0, 1, 2, 3}) {
			t.Errorf("%s: found %v", name, got)
		}
		for index, want := range map[int]string{
			0: "[]",
			1: "[process 4002 (holder) with nbd1 open process 4003 (holder) with nbd1 open]",
			2: "[mount of nbd2 at /mnt]",
			3: "[device md7 on nbd3p1]",
		} {
			if got := fmt.Sprint(found[index]); got != want {
				t.Errorf("%s: nbd%d has %s, want %s", name, index, got, want)
			}
		}
	}
	check("the system", system.Holders())
	check("the client", newClient(t, system).Holders())
	if found, err := system.Holders().FindAll(t.Context()); len(found) != 0 || err != nil {
		t.Errorf("of nothing: %v, %v", found, err)
	}
}

// TestDetachManyWalks holds that detaches at the same time share their walks.
func TestDetachManyWalks(t *testing.T) {
	const many = 12
	synctest.Test(t, func(t *testing.T) {
		_, k := fakeWorld(t, nbdnltest.Options{})
		system, b := tolled(k, 15)
		w := world{T: t, Client: newClient(t, system)}
		var wg sync.WaitGroup
		for range many {
			cfg := unserved(t)
			index := w.connect(cfg)
			wg.Go(func() {
				w.wantDone("detach", w.Detach(t.Context(), index, nbdnl.DetachOptions{Identifier: cfg.Identifier}))
			})
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			wg.Wait()
		}()
		b.pass(done)
		// Each wants one before it opens the device and one when it has written what is cached; the
		// first comes alone.
		if b.walks > 4 {
			t.Errorf("%d devices took %d walks, want no more than 4", many, b.walks)
		}
	})
}

// TestHoldersLaterWalk holds that nobody gets the result of a walk that began before he asked:
// whoever came meanwhile would be missed.
func TestHoldersLaterWalk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, k := fakeWorld(t, nbdnltest.Options{})
		system, b := tolled(k, 15)
		w := world{T: t, Client: newClient(t, system)}
		var wg sync.WaitGroup
		look := func(want int) {
			wg.Go(func() {
				holders, err := w.Holders().Find(t.Context(), 3)
				if err != nil || len(holders) != want {
					t.Errorf("holders are %v, error %v, want %d", holders, err, want)
				}
			})
		}
		look(0)
		synctest.Wait() // until the walk is at the toll, and has read which processes there are
		k.Hold(3)
		look(1)
		done := make(chan struct{})
		go func() {
			defer close(done)
			wg.Wait()
		}()
		b.pass(done)
		if b.walks != 2 {
			t.Errorf("%d walks, want 2", b.walks)
		}
	})
}
