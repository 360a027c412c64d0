package blockdev

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestKick takes a device away from a backend that does not come back and from somebody who holds
// it.
func TestKick(t *testing.T) {
	b := newElastic()
	arrived, release := make(chan struct{}), make(chan struct{})
	b.read = func() { close(arrived); <-release }
	k, d, kernel := manual(t, b, Options{DeadTimeout: time.Hour})
	_, let := k.Hold(d.Index())
	kernel.Write(readRequest(0))
	<-arrived
	start := time.Now()
	if err := d.Kick(t.Context()); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	if isDone(d) || d.State() != nbdnl.StateDisconnecting || d.Alive() > 1 {
		t.Errorf("done %t, %s, %d alive, while the backend is at work", isDone(d), d.State(), d.Alive())
	}
	if n := k.Commands(nbdnltest.Disconnect); n != 1 {
		t.Errorf("%d disconnects", n)
	}
	close(release)
	<-d.Done()
	if !errors.Is(d.Err(), errKicked) || d.State() != nbdnl.StateOrphaned || k.Commands(nbdnltest.Reconfigure) != 0 {
		t.Errorf("ended with %v, %s, and %d new connections", d.Err(), d.State(), k.Commands(nbdnltest.Reconfigure))
	}
	let()
	if err := d.Kick(t.Context()); err != nil {
		t.Errorf("again: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestKickReconnected holds that what ended a connection that was replaced is not what ended the
// device.
func TestKickReconnected(t *testing.T) {
	k, d := connected(t)
	d.lose(0)
	awaitState(t, d, nbdnl.StateDegraded)
	awaitState(t, d, nbdnl.StateLive)
	if err := d.Kick(t.Context()); err != nil {
		t.Error(err)
	}
	<-d.Done()
	if !errors.Is(d.Err(), errKicked) {
		t.Errorf("ended with %v", d.Err())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestKickStuckKernel has the kernel not answer.
func TestKickStuckKernel(t *testing.T) {
	k, d := connected(t)
	unblock := k.Block(nbdnltest.Disconnect)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := d.Kick(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	<-d.Done() // It serves no more, whatever the kernel does.
	unblock()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestKickSync ends a kicked device: that what is cached can't be written, or the device not be
// opened, is what Kick said, and is not told as a loss.
func TestKickSync(t *testing.T) {
	for name, end := range map[string]func(*Device) error{
		"Disconnect": func(d *Device) error { return d.Disconnect(context.Background()) },
		"Close":      (*Device).Close,
	} {
		k, d := connected(t)
		unblock := k.Block(nbdnltest.Disconnect) // The kernel has the device for longer than Kick waits.
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		k.FailSync(d.Index(), syscall.EIO)
		if err := d.Kick(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Kick: %v", err)
		}
		cancel()
		time.AfterFunc(50*time.Millisecond, unblock)
		if err := end(d); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := d.Loss(); err != nil {
			t.Errorf("%s: the loss of %v", name, err)
		}
		checkClean(t, k)
	}
}

// TestKickOther holds that Kick does not touch a device that has taken the index, also where the
// kernel does not tell whose it is.
func TestKickOther(t *testing.T) {
	for _, release := range []string{"6.12.0", "5.10.0"} {
		k, d := connectedOn(t, nbdnltest.Options{Release: release})
		other := k.Client()
		if err := other.DropAny(t.Context(), d.Index()); err != nil {
			t.Fatal(err)
		}
		<-d.Done()
		unblock := k.Block(nbdnltest.Status) // It need not be asked that nothing is in its place.
		if err := d.Kick(t.Context()); err != nil {
			t.Errorf("%s: with nothing in its place: %v", release, err)
		}
		unblock()
		next, err := d.machine.connect(t.Context(), d.Index(), newStore(), Options{Client: other})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Kick(t.Context()); err != nil || isDone(next) || next.State() != nbdnl.StateLive {
			t.Errorf("%s: error %v; the other is %s", release, err, next.State())
		}
		if err := errors.Join(d.Close(), next.Close()); err != nil {
			t.Errorf("%s: %v", release, err)
		}
		checkClean(t, k)
	}
}

// TestKickUnknown holds that Kick does not say that a device has gone of which it can't be told
// whether it is this one.
func TestKickUnknown(t *testing.T) {
	k, d := connectedOn(t, nbdnltest.Options{Release: "5.10.0"})
	client, incarnation := d.client, d.incarnation
	d.client, d.incarnation = k.Client(), 0
	if err := d.Kick(t.Context()); !errors.Is(err, errors.ErrUnsupported) || k.Setting(d.Index()).Sockets == 0 {
		t.Errorf("error %v, %d connections", err, k.Setting(d.Index()).Sockets)
	}
	<-d.Done()
	d.client, d.incarnation = client, incarnation
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}
