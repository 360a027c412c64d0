package blockdev_test

import (
	"bytes"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// TestKernelLossDisconnect loses a write that nobody syncs: the first Disconnect says so and ends
// the device, although the backend takes writes again, for the kernel has none left to send.
func TestKernelLossDisconnect(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	full := b.full()
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	full(true)
	if err := os.WriteFile(d.Path(), bytes.Repeat([]byte("x"), 8192), 0); err != nil {
		t.Fatalf("a write to the cache, and a close: %v", err)
	}
	full(false)
	for range 2 {
		checkLoss(t, "Loss", d.Loss())
	}
	checkLoss(t, "Disconnect", d.Disconnect(t.Context()))
	checkFree(t, d.Index(), d.Identifier())
	checkLoss(t, "Disconnect again", d.Disconnect(t.Context()))
	checkLoss(t, "Close", d.Close())
	checkLoss(t, "Loss after the end", d.Loss())
}

// TestKernelKickUnwritten kicks devices to which nothing was ever written, on which a read waits or
// that somebody holds: their end has nothing to tell but who holds them.
func TestKernelKickUnwritten(t *testing.T) {
	nbdnltest.RequireKernel(t)
	for name, o := range map[string]blockdev.Options{
		"":        {},
		"patient": {DeadTimeout: time.Minute},
		"two":     {Connections: 2},
	} {
		for _, held := range []bool{false, true} {
			b := newRecorder(1 << 20)
			d, err := blockdev.Connect(t.Context(), b, o)
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(d.Path())
			if err != nil {
				t.Fatal(err)
			}
			release := hang(b)
			read := make(chan error, 1)
			go func() {
				_, err := f.ReadAt(make([]byte, 4096), 512<<10)
				read <- err
			}()
			waitStuck(t, d)
			if err := d.Kick(t.Context()); err != nil {
				t.Errorf("%s, held %t: Kick: %v", name, held, err)
			}
			if err := <-read; err == nil {
				t.Errorf("%s, held %t: the read succeeds", name, held)
			}
			if !held {
				f.Close()
			}
			release()
			err = d.Close()
			var busy *nbdnl.BusyError
			if held && !(errors.As(err, &busy) && busy.Disconnected) || !held && err != nil ||
				errors.Is(err, nbdnl.ErrNotWritten) {
				t.Errorf("%s, held %t: Close: %v", name, held, err)
			}
			if err := d.Loss(); err != nil {
				t.Errorf("%s, held %t: the loss of %v", name, held, err)
			}
			f.Close()
			checkFree(t, d.Index(), d.Identifier())
		}
	}
}
