package blockdev_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends/file"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// fioUntilStopped has fio write and verify the first bytes of a device again and again. The func
// that it returns ends that, and returns what went wrong.
func fioUntilStopped(t *testing.T, device string, bytesOfIt int64) (stop func() error) {
	t.Helper()
	flag := filepath.Join(t.TempDir(), "stop")
	fio := exec.Command("sh", "-ec", fmt.Sprintf("until test -e %s; do "+
		"fio --name=verify --filename=%s --size=%d --ioengine=libaio --direct=1 --iodepth=16 "+
		"--rw=randwrite --bsrange=4k-64k --random_generator=tausworthe64 "+
		"--verify=crc32c --do_verify=1 --verify_fatal=1 --verify_backlog=64 --verify_state_save=0 --minimal; "+
		"done", flag, device, bytesOfIt))
	var out bytes.Buffer
	fio.Stdout, fio.Stderr = &out, &out
	if err := fio.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceValue(func() error {
		if err := os.WriteFile(flag, nil, 0o600); err != nil {
			return err
		}
		if err := fio.Wait(); err != nil {
			return fmt.Errorf("fio: %w\n%s", err, out.String())
		}
		return nil
	})
	t.Cleanup(func() { _ = stop() }) // Of a test that has failed.
	return stop
}

// TestKernelResizeUnderFio gives a device 20 other sizes while fio writes and verifies what it
// contains all the time: what is added is zeros, and can be written up to the end.
func TestKernelResizeUnderFio(t *testing.T) {
	nbdnltest.RequireKernel(t)
	const area, step, steps, sector = 8 << 20, 1 << 20, 20, 512
	path := filepath.Join(t.TempDir(), "disk")
	b, err := file.Open(path, file.Options{Create: true, Size: area})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	d := connect(t, b, blockdev.Options{})
	f := open(t, d, os.O_RDWR|syscall.O_DIRECT)
	stop := fioUntilStopped(t, d.Path(), area)

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	size, p := int64(area), aligned(t, sector)
	for i := range steps {
		for writes := d.Export().Stats().Write.Requests; d.Export().Stats().Write.Requests < writes+50; {
			select {
			case <-tick.C:
			case <-ctx.Done():
				t.Fatal("fio writes nothing")
			}
		}
		if i%4 == 3 {
			size -= 2 * step
			err = d.ForceResize(ctx, size)
		} else {
			size += step
			err = d.Resize(ctx, size)
		}
		if got := sysfs(t, d, "size") * sector; err != nil || got != size || d.Size() != size {
			t.Fatalf("resize %d, to %d: the kernel shows %d, the device says %d (%v)", i, size, got, d.Size(), err)
		}
		if i%4 != 3 {
			if _, err := f.ReadAt(p, size-sector); err != nil || !bytes.Equal(p, make([]byte, sector)) {
				t.Errorf("resize %d: the new end is %q (%v)", i, bytes.TrimRight(p, "\x00"), err)
			}
		}
		copy(p, fmt.Sprintf("end %d.", i))
		if _, err := f.WriteAt(p, size-sector); err != nil {
			t.Errorf("resize %d: write at the new end: %v", i, err)
		}
		got := make([]byte, sector)
		if _, err := b.ReadAt(got, size-sector); err != nil || !bytes.Equal(got, p) {
			t.Errorf("resize %d: the image ends in %q (%v)", i, bytes.TrimRight(got, "\x00"), err)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != size {
		t.Errorf("the image has another length than %d: %v, %v", size, st, err)
	}
	f.Close()
}
