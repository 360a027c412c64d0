package blockdev_test

import (
	"bytes"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// TestKernelStaleWrite has the backend hang in a write for longer than the device's timeout, so
// that the kernel repeats it on another connection, and writes newer data as soon as it is
// answered. What the backend has in the end must be these.
func TestKernelStaleWrite(t *testing.T) {
	nbdnltest.RequireKernel(t)
	tests := []struct {
		name  string
		quick bool // until then, so that the connection itself hangs, with another write behind it
		long  bool // for longer than the second connection lives, too
	}{
		{"hangs", false, false},
		{"hangs after having been quick", true, false},
		{"hangs for long", false, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			const off, behind = 65536, 131072
			b := newRecorder(1 << 20)
			d := connect(t, b, blockdev.Options{Connections: 2, Timeout: 2 * time.Second, DeadTimeout: time.Minute})
			f := open(t, d, os.O_RDWR|syscall.O_DIRECT)
			if tt.quick {
				p := aligned(t, 4096)
				for range 500 {
					if _, err := f.WriteAt(p, 0); err != nil {
						t.Fatal(err)
					}
				}
			}
			arrived, release := stallOnce(b, off)
			defer release()
			old, newer, other := aligned(t, 4096), aligned(t, 4096), aligned(t, 4096)
			copy(old, bytes.Repeat([]byte("old "), 1024))
			copy(newer, bytes.Repeat([]byte("new "), 1024))
			start, first, second := time.Now(), make(chan error, 1), make(chan error, 1)
			cpu := processors(t, d)[0] // Both are to take the same connection.
			write := func(off int64, result chan<- error) {
				onCPU(t, cpu, func() {
					_, err := f.WriteAt(old, off)
					result <- err
				})
			}
			go write(off, first)
			<-arrived
			go write(behind, second)
			await(t, func() bool { return len(first) > 0 || sum(d).InFlight > 1 })
			t.Logf("repeated after %v", time.Since(start))
			if _, err := f.ReadAt(other, 4096); err != nil {
				t.Error(err)
			}
			if err := <-second; err != nil {
				t.Error(err)
			}
			if _, err := f.WriteAt(newer, behind); err != nil {
				t.Error(err)
			}
			if tt.long {
				await(t, func() bool { return len(first) > 0 || sum(d).Write.Errors > 0 })
				t.Logf("the second connection is dead after %v", time.Since(start))
				if _, err := f.WriteAt(other, 8192); err != nil {
					t.Error(err)
				}
			}
			if len(first) > 0 {
				t.Error("the repetition was executed while the backend was at work on the first")
			} else {
				release()
			}
			if err := <-first; err != nil {
				t.Error(err)
			}
			t.Logf("answered after %v", time.Since(start))
			if _, err := f.WriteAt(newer, off); err != nil {
				t.Error(err)
			}
			release()
			awaitState(t, d, nbdnl.StateLive) // Nothing of the old connection is left then.
			for _, off := range []int64{off, behind} {
				if got := b.stored(off, 4096); !bytes.Equal(got, newer) {
					t.Errorf("at %d the backend has %q…, want %q…", off, got[:4], newer[:4])
				}
			}
			f.Close()
		})
	}
}

// await waits until a condition holds that nothing tells of.
func await(t *testing.T, holds func() bool) {
	t.Helper()
	for limit := time.After(30 * time.Second); !holds(); {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-limit:
			t.Fatal("in vain")
		}
	}
}

func sum(d *blockdev.Device) server.Stats {
	var s server.Stats
	for _, c := range d.Stats() {
		s.Add(&c)
	}
	return s
}
