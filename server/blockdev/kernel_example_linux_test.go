package blockdev_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends/memory"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// TestKernelExamplePool runs the example of a pool.
func TestKernelExamplePool(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const count = 4
	var mu sync.Mutex // guards paths
	paths := make(map[string]bool)
	var all sync.WaitGroup // who has a device waits for the others
	all.Add(count)
	err := useMany(t.Context(), count, func(path string) error {
		all.Done()
		all.Wait()
		mu.Lock()
		paths[path] = true
		mu.Unlock()
		return os.WriteFile(path, []byte("one of many"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(paths) != count {
		t.Errorf("devices %v, want %d different ones", paths, count)
	}
}

// connectMemory makes a device of 4 MiB of memory, which is copied fast enough where everything is
// slow.
func connectMemory(t *testing.T) (*blockdev.Device, *memory.Memory) {
	t.Helper()
	disk, err := memory.New(4<<20, memory.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.Close() })
	return connect(t, disk, blockdev.Options{}), disk
}

// writeStart writes to the start of a device, through the page cache.
func writeStart(t *testing.T, d *blockdev.Device, content string) {
	t.Helper()
	if _, err := open(t, d, os.O_RDWR).WriteAt([]byte(content), 0); err != nil {
		t.Fatal(err)
	}
}

// TestKernelExampleSnapshot runs the example of a snapshot, while what was written is only in the
// page cache.
func TestKernelExampleSnapshot(t *testing.T) {
	nbdnltest.RequireKernel(t)
	d, disk := connectMemory(t)
	writeStart(t, d, "to be kept")
	var to bytes.Buffer
	if err := snapshot(t.Context(), d, disk, &to); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, disk.Size())
	copy(want, "to be kept")
	if !bytes.Equal(to.Bytes(), want) {
		t.Errorf("the snapshot has %d bytes and begins with %q", to.Len(), to.Bytes()[:min(to.Len(), 16)])
	}
}

// TestKernelExampleSwap runs the example of a device that goes on in a file.
func TestKernelExampleSwap(t *testing.T) {
	nbdnltest.RequireKernel(t)
	d, disk := connectMemory(t)
	f := open(t, d, os.O_RDWR)
	writeAndSync := func(content string, off int64) {
		t.Helper()
		if _, err := f.WriteAt([]byte(content), off); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	writeAndSync("in memory", 0)
	path := filepath.Join(t.TempDir(), "disk.img")
	image, err := move(t.Context(), d, disk, path)
	if err != nil {
		t.Fatal(err)
	}
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
	writeAndSync("in a file", 1<<20)
	for off, want := range map[int64]string{0: "in memory", 1 << 20: "in a file"} {
		got := make([]byte, len(want))
		if _, err := image.ReadAt(got, off); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, string(got)); diff != "" {
			t.Errorf("the image at %d (-want +got):\n%s", off, diff)
		}
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if err := d.Disconnect(context.Background()); err != nil {
		t.Error(err)
	}
	if err := image.Close(); err != nil {
		t.Error(err)
	}
}

// TestKernelExampleBuse runs the example of a driver that was written for buse-go.
func TestKernelExampleBuse(t *testing.T) {
	nbdnltest.RequireKernel(t)
	d := &driver{data: make([]byte, 1<<20)}
	err := attach(t.Context(), d, func(path string) error {
		return os.WriteFile(path, []byte("as before"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(d.data, []byte("as before")) {
		t.Errorf("the driver begins with %q", d.data[:9])
	}
}
