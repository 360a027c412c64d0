package blockdev_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
	"github.com/nbdctl/nbdctl/server/blockdev"
)

// TestKernelBackendError holds that an error of the backend is an I/O error of its user, and
// nothing worse.
func TestKernelBackendError(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() }) // where the test has not come as far as its end
	f := open(t, d, os.O_RDWR|syscall.O_DIRECT)
	p := aligned(t, 4096)
	cause := errors.New("head crash")
	fail := func(op string, off int64) error {
		if off == 65536 {
			return cause
		}
		return nil
	}
	b.before.Store(&fail)
	if _, err := f.ReadAt(p, 65536); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	if _, err := f.WriteAt(p, 65536); !errors.Is(err, syscall.EIO) {
		t.Errorf("write: %v, want EIO", err)
	}
	if last := d.Export().LastError(); last == nil || !errors.Is(last, cause) || last.Offset != 65536 {
		t.Errorf("last error %v", last)
	}
	b.before.Store(nil)
	if _, err := f.ReadAt(p, 65536); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	f.Close()
	var loss *server.LossError
	if err := ended(t, d); !errors.As(err, &loss) || loss.Requests != 1 || !errors.Is(loss, cause) {
		t.Errorf("Close: %v, want the write that was lost", err)
	}
}

// TestKernelCancel ends the context at random moments of a connect to a backend that is slow at
// first, and lets the first read hang or fail: there is a device, or there is nothing.
func TestKernelCancel(t *testing.T) {
	nbdnltest.RequireKernel(t)
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cause := errors.New("not a readable disk")
	fail := func(string, int64) error { return cause }
	slow := func(string, int64) error {
		<-time.After(100 * time.Millisecond)
		return nil
	}
	rng := rand.New(rand.NewPCG(1, 2))
	const rounds = 30
	var connected int
	var whole time.Duration // what a complete connect takes
	for i := range rounds {
		b := newRecorder(1 << 20)
		limit := time.Minute
		if i > 0 {
			limit = time.Duration(rng.Int64N(int64(2 * whole)))
		}
		start, want := time.Now(), context.DeadlineExceeded
		switch i % 3 {
		case 1:
			b.before.Store(&slow)
		case 2:
			b.before.Store(&fail)
			limit, want = time.Minute, cause
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		o := blockdev.Options{Client: c, Identifier: nbdnl.NewIdentifier("cancelled")}
		d, err := blockdev.Connect(ctx, b, o)
		cancel()
		switch {
		case err == nil:
			connected++
			whole = time.Since(start)
			if err := d.Close(); err != nil {
				t.Errorf("round %d: %v", i, err)
			}
		case !errors.Is(err, want):
			t.Errorf("round %d: %v, want %v", i, err, want)
		}
		devices, err := c.Devices(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, st := range devices {
			if st.Identifier == o.Identifier {
				t.Errorf("round %d: %s is %s", i, nbdnl.Path(st.Index), st.State)
			}
		}
	}
	t.Logf("%d of %d connected; the latest took %v", connected, rounds, whole)
}

// TestKernelTimeout has the backend take longer than the device's timeout: the kernel gives up the
// connection, the user gets an I/O error, and Close removes what is left, and tells that what was
// cached is lost.
func TestKernelTimeout(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	d, err := blockdev.Connect(t.Context(), b, blockdev.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	f := open(t, d, os.O_RDONLY|syscall.O_DIRECT)
	release := make(chan struct{})
	stall := func(op string, off int64) error {
		if off == 65536 {
			<-release
		}
		return nil
	}
	b.before.Store(&stall)
	start := time.Now()
	if _, err := f.ReadAt(aligned(t, 4096), 65536); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	t.Logf("the kernel gave up after %v", time.Since(start))
	close(release)
	<-d.Done()
	if d.Err() == nil {
		t.Error("the device ended in order")
	}
	f.Close()
	// Nobody knows whether anything was cached that had no connection to go over.
	if err := d.Close(); err == nil || !errors.Is(err, d.Err()) {
		t.Errorf("close: %v, want what ended the device, %v", err, d.Err())
	}
	checkFree(t, d.Index(), d.Identifier())
}

// TestKernelStuckBackend ends a device whose backend does not come back from a request: the kernel
// lets go of it, the caller is told, and the device is done when the backend is.
func TestKernelStuckBackend(t *testing.T) {
	nbdnltest.RequireKernel(t)
	b := newRecorder(1 << 20)
	d := connect(t, b, blockdev.Options{})
	f := open(t, d, os.O_RDONLY|syscall.O_DIRECT)
	arrived, release := make(chan struct{}), make(chan struct{})
	stuck := func(op string, off int64) error {
		if off == 65536 {
			close(arrived)
			<-release
		}
		return nil
	}
	b.before.Store(&stuck)
	read := make(chan error, 1)
	p := aligned(t, 4096)
	go func() {
		_, err := f.ReadAt(p, 65536)
		f.Close()
		read <- err
	}()
	<-arrived

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	err := d.End(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1 requests are still") {
		t.Errorf("error %v, want one that tells of the request", err)
	}
	if err := <-read; !errors.Is(err, syscall.EIO) {
		t.Errorf("the read ended with %v, want EIO", err)
	}
	select {
	case <-d.Done():
		t.Error("done while the backend is at work")
	default:
	}
	close(release)
	<-d.Done()
	if err := d.Err(); err != nil {
		t.Errorf("ended with %v", err)
	}
}
