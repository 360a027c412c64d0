package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server/wire"
)

// An elastic store can be resized, and tells in which order things happen.
type elastic struct {
	store
	size   atomic.Int64
	fail   error
	events []string
	kernel func() uint64
	read   func()
}

func newElastic() *elastic {
	e := &elastic{store: newStore()}
	e.size.Store(size)
	return e
}

func (e *elastic) Size() int64 { return e.size.Load() }

func (e *elastic) ReadAt(p []byte, off int64) (int, error) {
	if e.read != nil {
		e.read()
	}
	return len(p), nil
}

func (e *elastic) Resize(n int64) error {
	e.events = append(e.events, fmt.Sprintf("backend to %d while the kernel has %d", n, e.kernel()))
	if e.fail == nil {
		e.size.Store(n)
	}
	return e.fail
}

// stretch returns a device with an elastic backend.
func stretch(t *testing.T) (*nbdnltest.Kernel, *Device, *elastic) {
	e := newElastic()
	k, d := connectedWith(t, nbdnltest.Options{}, e, Options{})
	e.kernel = func() uint64 { return k.Setting(d.Index()).Size }
	return k, d, e
}

// checkSizes compares what everybody has.
func checkSizes(t *testing.T, k *nbdnltest.Kernel, d *Device, device, kernel, export, backend int64) {
	t.Helper()
	want := []int64{device, kernel, export, backend}
	got := []int64{d.Size(), int64(k.Setting(d.Index()).Size), d.Export().Size(), d.backend.Size()}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("size of the device, for the kernel, the server, of the backend (-want +got):\n%s", diff)
	}
}

// TestResizeOrder holds that the kernel never has more than the backend.
func TestResizeOrder(t *testing.T) {
	k, d, e := stretch(t)
	before := k.Commands(nbdnltest.Reconfigure)
	for _, n := range []int64{2 * size, 2 * size, 512, size} {
		if err := d.Resize(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		checkSizes(t, k, d, n, n, n, n)
	}
	want := []string{
		"backend to 2097152 while the kernel has 1048576",
		"backend to 512 while the kernel has 512",
		"backend to 1048576 while the kernel has 512",
	}
	if diff := cmp.Diff(want, e.events); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	if n := k.Commands(nbdnltest.Reconfigure) - before; n != len(want) {
		t.Errorf("%d commands, want %d: none for the size that the device has", n, len(want))
	}
	for _, n := range []int64{0, -512, 513} {
		if err := d.Resize(t.Context(), n); err == nil {
			t.Errorf("a size of %d was taken", n)
		}
	}
	checkSizes(t, k, d, size, size, size, size)
}

// TestResizeFails lets each step fail: what was done before is undone, or the error says what is
// left.
func TestResizeFails(t *testing.T) {
	cause := errors.New("no such luck")
	t.Run("growing, backend", func(t *testing.T) {
		k, d, e := stretch(t)
		e.fail = cause
		if err := d.Resize(t.Context(), 2*size); !errors.Is(err, cause) {
			t.Errorf("error %v", err)
		}
		checkSizes(t, k, d, size, size, size, size)
	})
	t.Run("growing, kernel", func(t *testing.T) {
		k, d, _ := stretch(t)
		k.Fail(nbdnltest.Reconfigure, syscall.ENOMEM)
		if err := d.Resize(t.Context(), 2*size); !errors.Is(err, syscall.ENOMEM) {
			t.Errorf("error %v", err)
		}
		checkSizes(t, k, d, size, size, size, size)
	})
	t.Run("growing, no answer", func(t *testing.T) {
		k, d, e := stretch(t)
		unblock := k.Block(nbdnltest.Reconfigure)
		ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
		defer cancel()
		if err := d.Resize(ctx, 2*size); !errors.Is(err, cause) {
			t.Errorf("error %v", err)
		}
		checkSizes(t, k, d, size, size, 2*size, 2*size) // for the kernel may come to it
		unblock()
		if err := d.Resize(t.Context(), size); err != nil {
			t.Errorf("back: %v", err)
		}
		checkSizes(t, k, d, size, size, size, size)
		want := []string{
			"backend to 2097152 while the kernel has 1048576",
			"backend to 1048576 while the kernel has 1048576",
		}
		if diff := cmp.Diff(want, e.events); diff != "" {
			t.Errorf("calls (-want +got):\n%s", diff)
		}
	})
	t.Run("shrinking, kernel", func(t *testing.T) {
		k, d, _ := stretch(t)
		k.Fail(nbdnltest.Reconfigure, syscall.ENOMEM)
		if err := d.Resize(t.Context(), 512); !errors.Is(err, syscall.ENOMEM) {
			t.Errorf("error %v", err)
		}
		checkSizes(t, k, d, size, size, size, size)
	})
	t.Run("shrinking, backend", func(t *testing.T) {
		k, d, e := stretch(t)
		e.fail = cause
		if err := d.Resize(t.Context(), 512); !errors.Is(err, cause) {
			t.Errorf("error %v", err)
		}
		checkSizes(t, k, d, 512, 512, 512, size)
		e.fail = nil
		if err := d.Resize(t.Context(), 512); err != nil {
			t.Errorf("once more: %v", err)
		}
		checkSizes(t, k, d, 512, 512, 512, 512)
	})
	t.Run("shrinking, a request that does not end", func(t *testing.T) {
		k, d, e := stretch(t)
		arrived, release := make(chan struct{}), make(chan struct{})
		e.read = func() { close(arrived); <-release }
		client, end := net.Pipe()
		c := d.Export().NewConn(end, nil)
		served := make(chan error, 1)
		go func() { served <- c.Transmit() }()
		go io.Copy(io.Discard, client)
		client.Write(readRequest(size - 512))
		<-arrived
		ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
		defer cancel()
		if err := d.Resize(ctx, 512); !errors.Is(err, cause) {
			t.Errorf("error %v", err)
		}
		checkSizes(t, k, d, size, size, size, size)
		close(release)
		client.Close()
		<-served
	})
}

// readRequest is a READ of 512 bytes as the kernel sends it.
func readRequest(offset uint64) []byte {
	return (&wire.Request{Command: wire.CmdRead, Cookie: 42, Offset: offset, Length: 512}).Append(nil)
}

// TestShrinkHeld holds that a device in use keeps its size, unless that is forced.
func TestShrinkHeld(t *testing.T) {
	k, d, _ := stretch(t)
	unmount := k.Mount(d.Index(), "/mnt/data")
	var busy *nbdnl.BusyError
	if err := d.Resize(t.Context(), 512); !errors.As(err, &busy) || busy.Holders[0].Path != "/mnt/data" {
		t.Errorf("mounted: error %v, want a BusyError that names the mount", err)
	}
	checkSizes(t, k, d, size, size, size, size)
	if err := d.Resize(t.Context(), 2*size); err != nil {
		t.Errorf("growing: %v", err)
	}
	if err := d.ForceResize(t.Context(), 1024); err != nil {
		t.Errorf("forced: %v", err)
	}
	checkSizes(t, k, d, 1024, 1024, 1024, 1024)
	unmount()

	pid, release := k.Hold(d.Index())
	if err := d.Resize(t.Context(), 512); !errors.As(err, &busy) || busy.Holders[0].PID != pid {
		t.Errorf("open: error %v, want a BusyError that names the process", err)
	}
	time.AfterFunc(100*time.Millisecond, release)
	if err := d.Resize(t.Context(), 512); err != nil {
		t.Errorf("open for a moment: %v", err)
	}
	checkSizes(t, k, d, 512, 512, 512, 512)
}

// fixed is a backend that nobody but itself resizes.
type fixed struct {
	io.ReaderAt
	io.WriterAt
	size atomic.Int64
}

func (f *fixed) Size() int64 { return f.size.Load() }

// TestResizeByItself shows a disk that has grown to the kernel, and refuses every other size.
func TestResizeByItself(t *testing.T) {
	f := &fixed{ReaderAt: bytes.NewReader(nil)}
	f.size.Store(size)
	k, d := connectedWith(t, nbdnltest.Options{}, f, Options{})
	f.size.Store(2 * size)
	for _, n := range []int64{size / 2, size, size + 512, 4 * size} {
		if err := d.Resize(t.Context(), n); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("to %d: %v, want ErrUnsupported", n, err)
		}
	}
	checkSizes(t, k, d, size, size, size, 2*size)
	if err := d.Resize(t.Context(), 2*size); err != nil {
		t.Error(err)
	}
	checkSizes(t, k, d, 2*size, 2*size, 2*size, 2*size)

	k, d = connectedWith(t, nbdnltest.Options{}, newElastic(), Options{ReadOnly: true})
	err := d.Resize(t.Context(), 512)
	if err == nil || errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "is read-only") {
		t.Errorf("a read-only device: %v, want an error that says so", err)
	}
	checkSizes(t, k, d, size, size, size, size)
}

// TestReconfigure holds what the kernel is told of timeouts, and what is refused.
func TestReconfigure(t *testing.T) {
	k, d := connected(t)
	for _, tt := range []struct {
		timeout, dead time.Duration // negative: not given
		ok            bool
		want          [2]uint64
	}{
		{7 * time.Second, -1, true, [2]uint64{7, 0}},
		{-1, 9 * time.Second, true, [2]uint64{7, 9}},
		{8 * time.Second, 0, true, [2]uint64{8, 0}},
		{0, -1, false, [2]uint64{8, 0}},
		{time.Millisecond, -1, false, [2]uint64{8, 0}},
		{-1, time.Millisecond, false, [2]uint64{8, 0}},
	} {
		var u Update
		if tt.timeout >= 0 {
			u.Timeout = &tt.timeout
		}
		if tt.dead >= 0 {
			u.DeadTimeout = &tt.dead
		}
		if err := d.Reconfigure(t.Context(), u); (err == nil) != tt.ok {
			t.Errorf("%v, %v: error %v", tt.timeout, tt.dead, err)
		}
		st := k.Setting(d.Index())
		if got := [2]uint64{st.Timeout, st.DeadConnTimeout}; got != tt.want {
			t.Errorf("%v, %v: the kernel has %v, want %v", tt.timeout, tt.dead, got, tt.want)
		}
		if got := [2]uint64{uint64(d.Timeout() / time.Second), uint64(d.DeadTimeout() / time.Second)}; got != tt.want {
			t.Errorf("%v, %v: the device says %v, want %v", tt.timeout, tt.dead, got, tt.want)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Reconfigure(t.Context(), Update{}); !errors.Is(err, nbdnl.ErrNotConnected) {
		t.Errorf("after Close: %v", err)
	}
	if err := d.Resize(t.Context(), 512); !errors.Is(err, nbdnl.ErrNotConnected) {
		t.Errorf("after Close: %v", err)
	}
}

var _ backends.Resizer = (*elastic)(nil)
