package blockdev

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// connected returns a device on a fake kernel of today.
func connected(t *testing.T) (*nbdnltest.Kernel, *Device) {
	t.Helper()
	return connectedOn(t, nbdnltest.Options{})
}

func connectedOn(t *testing.T, ko nbdnltest.Options) (*nbdnltest.Kernel, *Device) {
	t.Helper()
	return connectedWith(t, ko, newStore(), Options{Connections: 2})
}

func connectedWith(t *testing.T, ko nbdnltest.Options, b backends.Backend, o Options) (*nbdnltest.Kernel, *Device) {
	t.Helper()
	k, m, lab := labOn(t, ko)
	o.Client = lab.Client
	d, err := m.connect(t.Context(), anyIndex, b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return k, d
}

// lose cuts the connection with that number.
func (d *Device) lose(number int) {
	d.conns.mu.Lock()
	defer d.conns.mu.Unlock()
	d.conns.all[number].conn.Close()
}

func isDone(d *Device) bool {
	select {
	case <-d.Done():
		return true
	default:
		return false
	}
}

// TestDisconnectHeld holds that a device in use goes on, and says who uses it.
func TestDisconnectHeld(t *testing.T) {
	k, d := connected(t)
	unmount := k.Mount(d.Index(), "/mnt/data")
	err := d.Disconnect(t.Context())
	var busy *nbdnl.BusyError
	if !errors.As(err, &busy) || len(busy.Holders) != 1 || busy.Holders[0].Path != "/mnt/data" {
		t.Errorf("error %v, want a BusyError that names the mount", err)
	}
	if isDone(d) || k.Setting(d.Index()).Sockets != 2 {
		t.Error("the device does not go on")
	}
	unmount()
	if err := d.Disconnect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !isDone(d) || d.Err() != nil {
		t.Errorf("done %t, error %v after the disconnect", isDone(d), d.Err())
	}
	if err := d.Disconnect(t.Context()); err != nil {
		t.Errorf("second disconnect: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("close after disconnect: %v", err)
	}
	checkClean(t, k)
}

// TestCloseHeld holds that Close ends a device in use, and says that its index is not free.
func TestCloseHeld(t *testing.T) {
	k, d := connected(t)
	_, release := k.Hold(d.Index())
	err := d.Close()
	var busy *nbdnl.BusyError
	if !errors.As(err, &busy) || !busy.Disconnected {
		t.Errorf("error %v, want a BusyError that says disconnected", err)
	}
	if !isDone(d) || d.Err() != nil {
		t.Errorf("done %t, error %v after Close", isDone(d), d.Err())
	}
	if err := d.Close(); !errors.As(err, &busy) {
		t.Errorf("second Close: %v, want the same", err)
	}
	release()
	checkClean(t, k)
}

// TestUnwritable holds that a device whose cache can't be written ends, for nothing is left to
// save, and that the end says what is lost.
func TestUnwritable(t *testing.T) {
	for name, end := range map[string]func(*Device) error{
		"Disconnect": func(d *Device) error { return d.Disconnect(context.Background()) },
		"Close":      (*Device).Close,
	} {
		k, d := connected(t)
		k.FailSync(d.Index(), syscall.ENOSPC)
		if err := end(d); !errors.Is(err, nbdnl.ErrNotWritten) || !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s: %v, want ENOSPC", name, err)
		}
		if !isDone(d) || d.Err() != nil {
			t.Errorf("%s: done %t, error %v", name, isDone(d), d.Err())
		}
		for _, again := range []error{d.Disconnect(t.Context()), d.Close()} {
			if !errors.Is(again, nbdnl.ErrNotWritten) || !errors.Is(again, syscall.ENOSPC) {
				t.Errorf("%s, and again: %v, want the same", name, again)
			}
		}
		checkClean(t, k)
	}
}

// TestDisconnectedByOther holds that the device notices, and that there is nothing left to end.
func TestDisconnectedByOther(t *testing.T) {
	k, d := connected(t)
	other := k.Client()
	if err := other.Drop(t.Context(), d.Index(), d.Identifier()); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
	if d.Err() != nil {
		t.Errorf("ended with %v", d.Err())
	}
	// The index may be another's by now, which must not be touched.
	next, err := d.machine.connect(t.Context(), d.Index(), newStore(), Options{Client: other})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Disconnect(t.Context()), d.Close()); err != nil {
		t.Errorf("ending what has gone: %v", err)
	}
	if isDone(next) {
		t.Error("another's device was ended")
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestDeadConnection holds that the loss of the only connection ends the device, and that Close
// then removes what the kernel has kept.
func TestDeadConnection(t *testing.T) {
	k, d := connectedWith(t, nbdnltest.Options{}, newStore(), Options{})
	d.lose(0)
	<-d.Done()
	if !errors.Is(d.Err(), net.ErrClosed) || d.State() != nbdnl.StateOrphaned || d.Alive() != 0 {
		t.Errorf("ended with %v, %s", d.Err(), d.State())
	}
	if k.Setting(d.Index()).Sockets != 1 || k.Commands(nbdnltest.Reconfigure) != 0 {
		t.Error("the kernel has let go of the device by itself, or was asked for something")
	}
	if err := d.Close(); !errors.Is(err, d.Err()) {
		t.Errorf("Close: %v, want what ended it", err)
	}
	if err := d.Close(); !errors.Is(err, d.Err()) {
		t.Errorf("second Close: %v, want the same", err)
	}
	checkClean(t, k)
}

// TestNoIdentifiers ends devices on a kernel that keeps no identifiers: living, dead, and replaced
// by another's.
func TestNoIdentifiers(t *testing.T) {
	old := nbdnltest.Options{Release: "5.10.0"}
	k, d := connectedOn(t, old)
	if err := d.Disconnect(t.Context()); err != nil {
		t.Errorf("living: %v", err)
	}
	checkClean(t, k)

	k, d = connectedOn(t, old)
	d.conns.cut()
	<-d.Done()
	if err := d.Close(); !errors.Is(err, d.Err()) {
		t.Errorf("dead: %v, want %v", err, d.Err())
	}
	checkClean(t, k)

	for _, by := range []string{"the same client", "another"} {
		k, d = connectedOn(t, old)
		client := d.client
		if by == "another" {
			client = k.Client()
		}
		d.conns.cut()
		<-d.Done()
		if err := client.DropAny(t.Context(), d.Index()); err != nil {
			t.Fatal(err)
		}
		next, err := d.machine.connect(t.Context(), d.Index(), newStore(), Options{Client: client})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); !errors.Is(err, d.Err()) || isDone(next) {
			t.Errorf("replaced by %s: %v, and another's device was ended: %t", by, err, isDone(next))
		}
		if err := next.Close(); err != nil {
			t.Error(err)
		}
		checkClean(t, k)
	}
}

// TestGoodbye tells a goodbye from a connection that merely ends.
func TestGoodbye(t *testing.T) {
	for _, tt := range []struct {
		sent string
		want error
	}{
		{"\x25\x60\x95\x13\x00\x00\x00\x02" + string(make([]byte, 20)), nil}, // NBD_CMD_DISC
		{"", io.ErrUnexpectedEOF},
		{"\x25\x60\x95\x13", io.ErrUnexpectedEOF},
	} {
		_, m, o := lab(t)
		d, err := m.newDevice(newStore(), o)
		if err != nil {
			t.Fatal(err)
		}
		l, err := openLinks(1, ampleSendBuffer, d.log)
		if err != nil {
			t.Fatal(err)
		}
		d.serve(l.ends())
		io.WriteString(l.kernelEnds[0], tt.sent)
		l.closeKernelEnds()
		<-d.Done()
		if err := d.Err(); !errors.Is(err, tt.want) {
			t.Errorf("after %q: %v, want %v", tt.sent, err, tt.want)
		}
	}
}

// TestManyEnds calls everything that ends a device at once.
func TestManyEnds(t *testing.T) {
	k, d := connected(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := d.Disconnect(t.Context()); err != nil {
				t.Errorf("Disconnect: %v", err)
			}
		})
		wg.Go(func() {
			if err := d.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
	wg.Wait()
	if !isDone(d) || d.Err() != nil {
		t.Errorf("done %t, error %v", isDone(d), d.Err())
	}
	checkClean(t, k)
}

// TestStuckKernel has the kernel not answer: calls end with their context, and the device can be
// ended later.
func TestStuckKernel(t *testing.T) {
	k, d := connected(t)
	unblock := k.Block(nbdnltest.Disconnect)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	first := make(chan error, 1)
	go func() { first <- d.Disconnect(ctx) }()
	if err := d.Disconnect(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one of two: %v", err)
	}
	if err := <-first; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the other of two: %v", err)
	}
	unblock()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if !isDone(d) || d.Err() != nil {
		t.Errorf("done %t, error %v", isDone(d), d.Err())
	}
	checkClean(t, k)
}
