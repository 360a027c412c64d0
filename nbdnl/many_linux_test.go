package nbdnl_test

import (
	"os"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// The kernel's list of all devices can't hold more than 3276.
func TestDevicesByTheThousand(t *testing.T) {
	const count, held, live = 4096, 3500, 4095
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		t.Setenv("TMPDIR", "/dev/shm") // tens of thousands of files, which are quicker to make there
	}
	w, k := fakeWorld(t, nbdnltest.Options{Devices: count})
	k.Hold(held)
	w.wantDone("connect", w.ConnectIndex(t.Context(), live, unserved(t)))
	begin := time.Now()
	devices, err := w.Devices(t.Context())
	took := time.Since(begin)
	w.wantDone("devices", err)
	if len(devices) != count {
		t.Fatalf("%d devices are listed, want %d", len(devices), count)
	}
	for i, d := range devices {
		want := nbdnl.StateIdle
		switch i {
		case held:
			want = nbdnl.StateHeld
		case live:
			want = nbdnl.StateLive
		}
		if d.Index != i || d.State != want {
			t.Errorf("device %d is nbd%d, %v, want %v", i, d.Index, d.State, want)
		}
	}
	wantQuick(t, count, took)
}

// With nbds_max=4096 this asks for many.
func TestKernelDevicesAreQuick(t *testing.T) {
	w := kernelWorld(t)
	begin := time.Now()
	devices, err := w.Devices(t.Context())
	w.wantDone("devices", err)
	wantQuick(t, len(devices), time.Since(begin))
}

// wantQuick checks that a list of 4096 devices takes less than two seconds.
func wantQuick(t *testing.T, count int, took time.Duration) {
	t.Helper()
	t.Logf("%d devices took %v", count, took)
	if limit := max(time.Duration(count)*2*time.Second/4096, 100*time.Millisecond); took > limit && !raceDetector {
		t.Errorf("%d devices took %v, more than %v", count, took, limit)
	}
}
