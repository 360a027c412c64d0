package blockdev

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
	"github.com/nbdctl/nbdctl/server"
)

// TestFlush holds that Flush syncs the device, says why it can't, and that the device goes on.
func TestFlush(t *testing.T) {
	k, d := connected(t)
	if err := d.Flush(t.Context()); err != nil || k.Syncs(d.Index()) == 0 {
		t.Errorf("error %v, %d syncs", err, k.Syncs(d.Index()))
	}
	k.FailSync(d.Index(), syscall.ENOSPC)
	if err := d.Flush(t.Context()); !errors.Is(err, syscall.ENOSPC) || isDone(d) {
		t.Errorf("error %v, done %t, want ENOSPC, and that the device goes on", err, isDone(d))
	}
	k.FailSync(d.Index(), nil)
	k.Hang(d.Index())
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	for range 2 { // The second one finds the context ended.
		if err := d.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v, want that of the context", err)
		}
	}
	if err := d.Close(); err == nil {
		t.Error("Close says nothing of a sync that does not end")
	}
	if err := d.Flush(t.Context()); !errors.Is(err, nbdnl.ErrNotConnected) {
		t.Errorf("after the end: %v, want ErrNotConnected", err)
	}
	checkClean(t, k)
}

// fails has the server fail a write, as the kernel would send it.
func fails(t *testing.T, d *Device, kernel interface{ Write([]byte) (int, error) }) {
	t.Helper()
	const beyond = "\x25\x60\x95\x13\x00\x00\x00\x01cookie..\x00\x00\x00\x00\x7f\x00\x00\x00\x00\x00\x02\x00"
	before := d.Export().Stats().Write.Errors
	kernel.Write(append([]byte(beyond), make([]byte, 512)...))
	for d.Export().Stats().Write.Errors == before {
		select {
		case <-d.Done():
			t.Fatal(d.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// TestLossTold holds that a loss is told by the same number however often it is asked for, until it
// is acknowledged, that a new one has the next, and that all remain known.
func TestLossTold(t *testing.T) {
	k, d, kernel := manual(t, newElastic(), Options{})
	for range 2 {
		fails(t, d, kernel)
	}
	for range 2 {
		checkLoss(t, "Flush", d.Flush(t.Context()), 2, 2)
	}
	if d.Acknowledge(1) || d.Acknowledge(3) {
		t.Error("a loss is acknowledged that is not the last")
	}
	checkLoss(t, "Flush", d.Flush(t.Context()), 2, 2)
	if !d.Acknowledge(2) {
		t.Error("the last loss can't be acknowledged")
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Errorf("Flush after it was acknowledged: %v", err)
	}
	fails(t, d, kernel)
	for range 2 {
		checkLoss(t, "Flush", d.Flush(t.Context()), 3, 1)
	}
	for range 2 {
		checkLoss(t, "Close", d.Close(), 3, 1)
	}
	checkLoss(t, "Loss", d.Loss(), 3, 3)
	if !d.Acknowledge(3) || d.Close() != nil || d.Disconnect(t.Context()) != nil {
		t.Error("the end tells a loss that was acknowledged")
	}
	checkLoss(t, "Loss", d.Loss(), 3, 3)
	checkClean(t, k)
}

// checkLoss holds the number of a loss, and how many requests that have failed it tells of.
func checkLoss(t *testing.T, what string, err error, number, requests uint64) {
	t.Helper()
	var loss *LossError
	var failed *server.LossError
	if !errors.As(err, &loss) || loss.Number != number || !errors.As(err, &failed) || failed.Requests != requests ||
		failed.First.Offset != 0x7f000000 {
		t.Errorf("%s: %v, want loss number %d, of %d requests", what, err, number, requests)
	}
}

// TestLossUnwritten holds that what the kernel says once of a failed write is a loss, also where
// Flush did not wait for it.
func TestLossUnwritten(t *testing.T) {
	k, d := connected(t)
	check := func(what string, err error, number uint64, reason error) {
		t.Helper()
		var loss *LossError
		if !errors.As(err, &loss) || loss.Number != number || !errors.Is(loss.Unwritten, reason) ||
			err.Error() != loss.Error() { // and says it once
			t.Errorf("%s: %v, want loss number %d, %v", what, err, number, reason)
		}
	}
	k.FailSync(d.Index(), syscall.ENOSPC)
	check("Flush", d.Flush(t.Context()), 1, syscall.ENOSPC)
	k.FailSync(d.Index(), nil)
	check("Flush again", d.Flush(t.Context()), 1, syscall.ENOSPC)
	check("Loss", d.Loss(), 1, syscall.ENOSPC)
	if !d.Acknowledge(1) || d.Flush(t.Context()) != nil {
		t.Error("told after it was acknowledged")
	}
	select {
	case <-d.Changes():
	default:
	}
	k.Hang(d.Index())
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := d.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) || errors.As(err, new(*LossError)) {
		t.Errorf("error %v, want only that of the context", err)
	}
	k.Release(d.Index()) // The sync fails with EIO, and nobody waits for it.
	<-d.Changes()
	check("Loss", d.Loss(), 2, syscall.ENOSPC)
	check("Flush", d.Flush(t.Context()), 2, syscall.EIO)
	check("Close", d.Close(), 2, syscall.EIO)
	checkClean(t, k)
}

// TestLossRefused holds that a loss is not told by a Disconnect that leaves the device, and that
// what tells it ends the device.
func TestLossRefused(t *testing.T) {
	k, d, kernel := manual(t, newElastic(), Options{})
	if err := d.Loss(); err != nil {
		t.Errorf("before any: %v", err)
	}
	fails(t, d, kernel)
	unmount := k.Mount(d.Index(), "/mnt/data")
	var loss *server.LossError
	if err := d.Disconnect(t.Context()); !errors.Is(err, nbdnl.ErrBusy) || isDone(d) {
		t.Errorf("mounted: %v, done %t", err, isDone(d))
	}
	unmount()
	if err := d.Disconnect(t.Context()); !errors.As(err, &loss) || loss.Requests != 1 || !isDone(d) {
		t.Errorf("Disconnect: %v, done %t, want the loss of one write, and the end", err, isDone(d))
	}
	for _, err := range []error{d.Disconnect(t.Context()), d.Close()} {
		if !errors.As(err, &loss) || loss.Requests != 1 {
			t.Errorf("again: %v, want the same", err)
		}
	}
	if err := d.Loss(); !errors.As(err, &loss) || loss.Requests != 1 {
		t.Errorf("Loss after the end: %v", err)
	}
	checkClean(t, k)
}

// TestLossChanges holds that a loss is among the changes that are told.
func TestLossChanges(t *testing.T) {
	k, d, kernel := manual(t, newElastic(), Options{})
	select {
	case <-d.Changes():
	default:
	}
	fails(t, d, kernel)
	<-d.Changes()
	if d.Loss() == nil {
		t.Error("a change, but no loss")
	}
	if d.Close() == nil {
		t.Error("Close says nothing of a loss")
	}
	checkClean(t, k)
}

// TestGapTold holds that a device tells of it when requests may have waited for longer than the
// kernel lets them.
func TestGapTold(t *testing.T) {
	for _, tt := range []struct {
		deadTimeout time.Duration
		readOnly    bool
		told        bool
	}{
		{time.Second, false, true},
		{time.Second, true, false},
		{time.Hour, false, false},
	} {
		o := Options{DeadTimeout: tt.deadTimeout, ReadOnly: tt.readOnly}
		k, d := connectedWith(t, nbdnltest.Options{}, newStore(), o)
		unblock := k.Block(nbdnltest.Reconfigure)
		d.lose(0)
		awaitState(t, d, nbdnl.StateWaiting)
		time.AfterFunc(time.Second, unblock)
		awaitState(t, d, nbdnl.StateLive)
		checkTold(t, k, d, tt.told)
	}
}

// checkTold holds whether the device tells of something that may be lost, until that is
// acknowledged, and ends it.
func checkTold(t *testing.T, k *nbdnltest.Kernel, d *Device, want bool) {
	t.Helper()
	if err := d.Flush(t.Context()); (err != nil) != want || isDone(d) {
		t.Errorf("dead timeout %v, read-only %v: Flush tells %v", d.DeadTimeout(), d.ReadOnly(), err)
	}
	if err := d.Loss(); (err != nil) != want {
		t.Errorf("dead timeout %v, read-only %v: Loss tells %v", d.DeadTimeout(), d.ReadOnly(), err)
	}
	if got := d.Acknowledge(1); got != want {
		t.Errorf("dead timeout %v, read-only %v: a loss can be acknowledged: %t", d.DeadTimeout(), d.ReadOnly(), got)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// A stuck backend answers reads on the goroutine of the connection, and hangs in the first.
type stuck struct {
	*elastic
	arrived, release chan struct{}
}

func (s stuck) ReadAtTo(w backends.Reply, _ int64, n int) error {
	close(s.arrived)
	<-s.release
	clear(w.Buffer(n))
	return nil
}

// WriteAtFrom takes nothing. That it is there makes the device wait for the call, since a write
// could be in it.
func (s stuck) WriteAtFrom(backends.Payload, int64, int) error { return backends.ErrWouldBlock }

// TestGapUnseen holds that the time counts in which the kernel had given up a connection whose
// server was in a call of the backend and did not see it.
func TestGapUnseen(t *testing.T) {
	for _, tt := range []struct {
		timeout, deadTimeout, hang time.Duration
		told                       bool
	}{
		{500 * time.Millisecond, time.Second, 2 * time.Second, true},
		{500 * time.Millisecond, time.Hour, 2 * time.Second, false},
		{time.Hour, 2 * time.Second, 2200 * time.Millisecond, false}, // The kernel has noticed at the end, or later.
	} {
		b := stuck{newElastic(), make(chan struct{}), make(chan struct{})}
		k, d, kernel := manual(t, b, Options{})
		d.conns.setTimeouts(&tt.timeout, &tt.deadTimeout)
		kernel.Write(readRequest(0))
		<-b.arrived
		shutdown(t, kernel)
		<-time.After(tt.hang)
		if s := d.State(); s != nbdnl.StateLive || k.Commands(nbdnltest.Reconfigure) > 0 {
			t.Errorf("%+v: %s, and it was seen that the connection is dead: there is nothing to show", tt, s)
		}
		close(b.release)
		for k.Commands(nbdnltest.Reconfigure) == 0 || d.State() != nbdnl.StateLive {
			select {
			case <-d.Changes():
			case <-d.Done():
				t.Fatal(d.Err())
			}
		}
		checkTold(t, k, d, tt.told)
	}
}
