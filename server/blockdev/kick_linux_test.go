package blockdev_test

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// hang makes every request of the backend wait until release is called.
func hang(b *recorder) (release func()) {
	released := make(chan struct{})
	hook := func(string, int64) error { <-released; return nil }
	b.before.Store(&hook)
	return sync.OnceFunc(func() { close(released) })
}

// TestKernelKick frees readers and writers from a backend that never answers.
func TestKernelKick(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(8 << 20)
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{Connections: 2, DeadTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	release := hang(b)
	defer release()
	ended := crowd(t, d)
	waitStuck(t, d)
	start := time.Now()
	if err := d.Kick(t.Context()); err != nil {
		t.Error(err)
	}
	for range crowdSize {
		if err := <-ended; !errors.Is(err, syscall.EIO) {
			t.Errorf("ended with %v, want EIO", err)
		}
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("stuck I/O came free after %v", took)
	}
	select {
	case <-d.Done():
		t.Error("done while the backend is at work")
	default:
	}
	if s := d.State(); s != nbdnl.StateDisconnecting {
		t.Errorf("state %s", s)
	}
	release()
	<-d.Done()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkFree(t, d.Index(), d.Identifier())
}

const crowdSize = 12

// crowd reads and writes more than a connection has room for, and passes on how each ended.
func crowd(t *testing.T, d *blockdev.Device) <-chan error {
	t.Helper()
	f, err := os.OpenFile(d.Path(), os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, crowdSize)
	var wg sync.WaitGroup
	for i := range crowdSize {
		p := aligned(t, 512<<10)
		wg.Go(func() {
			var err error
			if i%3 == 0 {
				_, err = f.ReadAt(p, int64(i)<<19)
			} else {
				_, err = f.WriteAt(p, int64(i)<<19)
			}
			ended <- err
		})
	}
	go func() { wg.Wait(); f.Close() }()
	return ended
}

// waitStuck returns when requests are in the backend, and no more of them come.
func waitStuck(t *testing.T, d *blockdev.Device) {
	t.Helper()
	last, same := -1, 0
	for limit := time.Now().Add(20 * time.Second); same < 5; {
		if time.Now().After(limit) {
			t.Fatal("nothing gets stuck")
		}
		n := d.Export().Stats().InFlight
		if same++; n != last || n == 0 {
			last, same = n, 0
		}
		<-time.After(100 * time.Millisecond)
	}
}

// TestKernelCloseStuck ends a device whose backend hangs for good and whose connections are full,
// so that the kernel's own goodbye has no room: within the bound of Close, and without others who
// talk to the driver being held up for longer than that.
func TestKernelCloseStuck(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(8 << 20)
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{MaxInFlight: 1, Timeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	release := hang(b)
	defer release()
	ended := crowd(t, d)
	waitStuck(t, d)

	other, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	stop := make(chan struct{})
	var longest time.Duration
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
			start := time.Now()
			if _, err := other.Status(t.Context(), d.Index()+1); err != nil {
				t.Errorf("another user of the driver: %v", err)
			}
			longest = max(longest, time.Since(start))
		}
	})
	start := time.Now()
	err = d.Close()
	took := time.Since(start)
	if err == nil {
		t.Error("Close says nothing of what is lost and left")
	}
	if took > 32*time.Second {
		t.Errorf("Close took %v", took)
	}
	for range crowdSize {
		if err := <-ended; !errors.Is(err, syscall.EIO) {
			t.Errorf("ended with %v, want EIO", err)
		}
	}
	checkFree(t, d.Index(), d.Identifier())
	close(stop)
	wg.Wait()
	t.Logf("Close took %v and said: %v", took, err)
	t.Logf("another user of the driver waited for %v at most", longest)
	if longest > 20*time.Second {
		t.Errorf("another user of the driver waited for %v", longest)
	}
	release()
	<-d.Done()
}
