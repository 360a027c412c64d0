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

// TestKick takes a device away from a backend that does not come back and from somebody who holds it.
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

// TestKickSync ends a kicked device: that what is cached can't be written, or the device not be opened, is what Kick said, and is not
// told as a loss.
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

// TestKickOther leaves a device alone that has taken the index.
func TestKickOther(t *testing.T) {
	k, d := connected(t)
	other := k.Client()
	if err := other.Drop(t.Context(), d.Index(), d.Identifier()); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
	next, err := d.machine.connect(t.Context(), d.Index(), newStore(), Options{Client: other})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Kick(t.Context()); err != nil || isDone(next) || next.State() != nbdnl.StateLive {
		t.Errorf("error %v; the other is %s", err, next.State())
	}
	if err := errors.Join(d.Close(), next.Close()); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}
