package blockdev_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// TestKernelOverdue has a backend that is slower than the timeout in one place, or never comes back
// from there. The request fails, however often the kernel sends it again, at the latest 10 s after
// both timeouts; its neighbours go on and lose nothing.
func TestKernelOverdue(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const at = 65536
	for _, tt := range []struct {
		name          string
		write         bool
		timeout, dead time.Duration
		takes         time.Duration // 0: for ever
		connections   int
	}{
		{"slow read", false, 3 * time.Second, 10 * time.Second, 8 * time.Second, 1},
		{"slow write", true, 3 * time.Second, 10 * time.Second, 8 * time.Second, 1},
		{"stuck read", false, time.Second, 2 * time.Second, 0, 1},
		{"stuck write", true, time.Second, 2 * time.Second, 0, 1},
		{"stuck write, several connections", true, 2 * time.Second, time.Second, 0, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newRecorder(1 << 20)
			d := connect(t, b, blockdev.Options{Connections: tt.connections, Timeout: tt.timeout, DeadTimeout: tt.dead})
			f := open(t, d, os.O_RDWR|syscall.O_DIRECT)
			release := make(chan struct{})
			let := sync.OnceFunc(func() { close(release) })
			defer let()
			var calls atomic.Int32
			hook := func(op string, off int64) error {
				if off == at && (op == "write") == tt.write {
					calls.Add(1)
					if tt.takes == 0 {
						<-release
					} else {
						<-time.After(tt.takes)
					}
				}
				return nil
			}
			b.before.Store(&hook)
			ask := func(p []byte) error {
				var err error
				if tt.write {
					_, err = f.WriteAt(p, at)
				} else {
					_, err = f.ReadAt(p, at)
				}
				return err
			}

			var neighbours sync.WaitGroup
			over := make(chan struct{})
			neighbours.Go(func() {
				p, q := aligned(t, 4096), aligned(t, 4096)
				rounds, worst := 0, time.Duration(0)
				for ; ; rounds++ {
					select {
					case <-over:
						t.Logf("neighbours: %d rounds, the slowest took %v", rounds, worst)
						if rounds == 0 {
							t.Error("the neighbours have not come to anything")
						}
						return
					default:
					}
					start := time.Now()
					copy(p, bytes.Repeat([]byte{byte(rounds)}, len(p)))
					_, werr := f.WriteAt(p, at+8192)
					_, rerr := f.ReadAt(q, at+8192)
					if err := errors.Join(werr, rerr); err != nil || !bytes.Equal(p, q) {
						t.Errorf("neighbours, round %d: %v", rounds, err)
						return
					}
					worst = max(worst, time.Since(start))
				}
			})
			p := aligned(t, 4096)
			copy(p, bytes.Repeat([]byte("old "), 1024))
			start := time.Now()
			err := ask(p)
			took, n := time.Since(start), calls.Load()
			t.Logf("%v after %v, %d calls", err, took, n)
			if limit := tt.timeout + tt.dead + 10*time.Second; !errors.Is(err, syscall.EIO) || took > limit {
				t.Errorf("%v after %v, want EIO within %v", err, took, limit)
			}
			if took < tt.timeout+tt.dead {
				t.Errorf("the request failed after %v, before its time", took)
			}
			// Whoever tries again is told sooner, without harm to the others.
			if err := ask(p); !errors.Is(err, syscall.EIO) {
				t.Errorf("again: %v", err)
			}
			close(over)
			neighbours.Wait()

			// What was written there later is there in the end.
			newer := aligned(t, 4096)
			copy(newer, bytes.Repeat([]byte("new "), 1024))
			b.before.Store(nil)
			let()
			await(t, func() bool { return sum(d).InFlight == 0 })
			if _, err := f.WriteAt(newer, at); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			awaitState(t, d, nbdnl.StateLive)
			if got := b.stored(at, 4096); !bytes.Equal(got, newer) {
				t.Errorf("the backend has %q…", got[:4])
			}
			f.Close()
			// Who wrote was told; the owner is, too.
			var loss *server.LossError
			if err := d.Disconnect(t.Context()); errors.As(err, &loss) != tt.write || !tt.write && err != nil {
				t.Errorf("disconnect: %v", err)
			}
			if tt.write {
				acknowledge(t, d)
			}
		})
	}
}

// A patientDisk hangs in one place, unless nobody waits any more.
type patientDisk struct {
	*recorder
	entered, gaveUp chan struct{}
}

func (d patientDisk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if off == 65536 {
		d.entered <- struct{}{}
		<-ctx.Done()
		d.gaveUp <- struct{}{}
		return 0, ctx.Err()
	}
	return d.recorder.ReadAt(p, off)
}

// TestKernelGiveUp has a backend hang in a read that knows when nobody waits for it any more. It is
// told at Kick, at Close, and when the kernel gives the connection up; Close then has nothing to
// wait for.
func TestKernelGiveUp(t *testing.T) {
	nbdnltest.RequireKernel(t)
	for name, end := range map[string]func(*blockdev.Device) error{
		"Close":         (*blockdev.Device).Close,
		"Kick":          func(d *blockdev.Device) error { return errors.Join(d.Kick(context.Background()), d.Close()) },
		"after timeout": func(d *blockdev.Device) error { <-d.Done(); d.Close(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := patientDisk{newRecorder(1 << 20), make(chan struct{}), make(chan struct{}, 1)}
			d := connect(t, b, blockdev.Options{Timeout: 2 * time.Second})
			f := open(t, d, os.O_RDONLY|syscall.O_DIRECT)
			read := make(chan error, 1)
			p := aligned(t, 4096)
			go func() {
				_, err := f.ReadAt(p, 65536)
				f.Close()
				read <- err
			}()
			<-b.entered
			start := time.Now()
			if err := end(d); err != nil {
				t.Error(err)
			}
			if took := time.Since(start); took > 8*time.Second {
				t.Errorf("it took %v", took)
			}
			<-b.gaveUp
			if err := <-read; !errors.Is(err, syscall.EIO) {
				t.Errorf("the read ended with %v", err)
			}
			<-d.Done()
			if d.Loss() != nil { // That nothing was cached nobody knows.
				acknowledge(t, d)
			}
		})
	}
}
