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
	t.Logf("%d devices took %v", count, took)
	if took > 2*time.Second && !raceDetector {
		t.Errorf("%d devices took %v", count, took)
	}
}

// A device costs no more than a few files in sysfs, however many there are: with nbds_max=4096 this
// asks for many. Machines differ too much in what that is to name a time.
func TestKernelDevicesAreCheap(t *testing.T) {
	w := kernelWorld(t)
	begin := time.Now()
	devices, err := w.Devices(t.Context())
	took := time.Since(begin)
	w.wantDone("devices", err)
	read := readTime(t)
	t.Logf("%d devices took %v, a read takes %v", len(devices), took, read)
	if limit := 30*read*time.Duration(len(devices)) + 50*time.Millisecond; took > limit {
		t.Errorf("%d devices took %v, more than %v", len(devices), took, limit)
	}
}

// readTime returns what a file in sysfs costs here and now.
func readTime(t *testing.T) time.Duration {
	t.Helper()
	const reads = 200
	begin := time.Now()
	for range reads {
		if _, err := os.ReadFile("/sys/block/nbd0/size"); err != nil {
			t.Fatal(err)
		}
	}
	return time.Since(begin) / reads
}
