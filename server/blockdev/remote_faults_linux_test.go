package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// end returns the server's end of a connection, by the order in which they were made.
func (f *farExport) end(n int) *net.TCPConn {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ends[n]
}

// hasEnded fails the test unless the server sees the end of a connection.
func (f *farExport) hasEnded(t *testing.T, n int) {
	t.Helper()
	end := f.end(n)
	_ = end.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.Copy(io.Discard, end); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the server's connection %d does not end", n)
	}
}

// watchedOf returns what watches the connection with that number.
func (d *Device) watchedOf(number int) *watched {
	d.conns.mu.Lock()
	defer d.conns.mu.Unlock()
	return d.conns.all[number].conn.(*watched)
}

// shut is what the kernel does to a connection that has exceeded its timeout.
func (w *watched) shut() error {
	return control(w.socket, func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) })
}

// awaitReplaced waits until so many connections were replaced, and all are alive.
func awaitReplaced(t *testing.T, d *Device, n int64) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for o := d.Outage(); o.Replaced < n || o.Alive < d.Connections(); o = d.Outage() {
		select {
		case <-d.Changes():
		case <-d.Done():
			t.Fatal("done", d.Err())
		case <-limit:
			t.Fatalf("%+v, want %d replaced", o, n)
		}
	}
}

// TestRemoteShutDown holds that a connection which the kernel has shut down ends for its server,
// and is replaced by another that carries bytes both ways.
func TestRemoteShutDown(t *testing.T) {
	f := newFarExport(t)
	k, d := connectedFar(t, f, Options{DeadTimeout: time.Hour})
	if err := d.watchedOf(0).shut(); err != nil {
		t.Fatal(err)
	}
	awaitReplaced(t, d, 1)
	f.hasEnded(t, 0)
	end, w := f.end(1), d.watchedOf(0)
	if f.count() != 2 || k.Dead(d.Index()) != 0 {
		t.Errorf("%d connections were dialled, %d are dead", f.count(), k.Dead(d.Index()))
	}
	p := make([]byte, 4)
	if err := control(w.socket, func(fd int) error {
		_, err := unix.Write(fd, []byte("asks"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(end, p); err != nil || string(p) != "asks" {
		t.Errorf("the server reads %q, %v", p, err)
	}
	if _, err := end.Write([]byte("says")); err != nil {
		t.Fatal(err)
	}
	if err := control(w.socket, func(fd int) error {
		_, err := unix.Read(fd, p)
		return err
	}); err != nil || string(p) != "says" {
		t.Errorf("the kernel reads %q, %v", p, err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	f.hasEnded(t, 1)
	checkClean(t, k)
}

// TestRemoteUndone holds that a connection which the kernel takes, and shuts down a moment later,
// is replaced once more.
func TestRemoteUndone(t *testing.T) {
	for _, late := range []time.Duration{0, 600 * time.Millisecond} {
		f := newFarExport(t)
		k, d := connectedFar(t, f, Options{DeadTimeout: time.Hour})
		k.Undo(late)
		f.reset()
		f.await(t, d, 3)
		awaitState(t, d, nbdnl.StateLive)
		f.hasEnded(t, 1)
		if err := d.Disconnect(t.Context()); err != nil || k.Commands(nbdnltest.Reconfigure) != 2 {
			t.Errorf("after %v: %d commands, %v", late, k.Commands(nbdnltest.Reconfigure), err)
		}
		checkClean(t, k)
	}
}

// TestRemoteSeveral holds that of several connections only the lost one is replaced, and that
// Outage tells of it while the others go on.
func TestRemoteSeveral(t *testing.T) {
	f := newFarExport(t)
	k, d := connectedFar(t, f, Options{Connections: 3})
	others := [2]*watched{d.watchedOf(0), d.watchedOf(1)}
	lost := errors.New("no route")
	f.set(lost)
	f.reset()
	f.await(t, d, 5)
	awaitState(t, d, nbdnl.StateDegraded)
	o := d.Outage()
	if o.Alive != 2 || !o.Since.IsZero() || o.Replaced != 0 || !strings.Contains(fmt.Sprint(o.Err), "no route") {
		t.Errorf("meanwhile: %+v", o)
	}
	if errors.Is(o.Err, lost) {
		t.Error("what Dial says is taken for an answer of the kernel")
	}
	f.set(nil)
	awaitReplaced(t, d, 1)
	now := [2]*watched{d.watchedOf(0), d.watchedOf(1)}
	if o := d.Outage(); o != (Outage{Alive: 3, Replaced: 1}) || now != others {
		t.Errorf("afterwards: %+v, the others are those from before: %t", o, now == others)
	}
	if d.Loss() != nil {
		t.Errorf("a loss: %v", d.Loss())
	}
	if err := d.Disconnect(t.Context()); err != nil {
		t.Error(err)
	}
	for n := range 4 {
		f.hasEnded(t, n)
	}
	checkClean(t, k)
}

// TestRemoteTaken holds that a device which has another owner by now is not given a connection,
// also where the kernel does not tell whose it is.
func TestRemoteTaken(t *testing.T) {
	for _, release := range []string{"6.12.0", "5.10.0"} {
		t.Run(release, func(t *testing.T) {
			f := newFarExport(t)
			k, m, lab := labOn(t, nbdnltest.Options{Release: release})
			lab.DeadTimeout = time.Hour
			d, err := m.connectRemote(t.Context(), anyIndex, f, lab)
			if err != nil {
				t.Fatal(err)
			}
			f.set(errors.New("no route"))
			f.reset()
			f.await(t, d, 3)
			d.commanding <- struct{}{} // Until the other is there.
			other := k.Client()
			if err := other.DropAny(t.Context(), d.Index()); err != nil {
				t.Fatal(err)
			}
			theirs, err := m.connect(t.Context(), d.Index(), newStore(), Options{Client: other, DeadTimeout: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			f.set(nil)
			<-d.commanding
			<-d.Done()
			if d.Err() != nil || d.State() != nbdnl.StateIdle {
				t.Errorf("ended with %v, %s", d.Err(), d.State())
			}
			n, state, outage := k.Commands(nbdnltest.Reconfigure), theirs.State(), theirs.Outage()
			if n != 0 || state != nbdnl.StateLive || outage.Replaced != 0 {
				t.Errorf("%d commands, and the other is %s, %+v", n, state, outage)
			}
			if err := errors.Join(d.Close(), theirs.Close()); err != nil {
				t.Error(err)
			}
			checkClean(t, k)
		})
	}
}

// TestRemoteTakenHeld holds that a device which somebody else disconnects while it is open ends in
// order when it is let go, though its server is away.
func TestRemoteTakenHeld(t *testing.T) {
	for name, away := range map[string]error{"there": nil, "away": errors.New("no route")} {
		t.Run(name, func(t *testing.T) {
			f := newFarExport(t)
			k, d := connectedFar(t, f, Options{DeadTimeout: time.Hour})
			_, release := k.Hold(d.Index())
			if away != nil {
				f.set(away)
				f.reset()
				f.await(t, d, 3)
			}
			dropped, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_ = k.Client().Drop(dropped, d.Index(), d.Identifier()) // It may say that it is held still.
			release()
			<-d.Done()
			if d.Err() != nil || d.State() != nbdnl.StateIdle {
				t.Errorf("ended with %v, %s", d.Err(), d.State())
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			checkClean(t, k)
		})
	}
}

// TestRemoteEndedAway holds that a device whose server is away can be ended, at once, and that
// nothing is dialled any more then.
func TestRemoteEndedAway(t *testing.T) {
	for name, end := range map[string]func(*Device) error{
		"Close":      (*Device).Close,
		"Disconnect": func(d *Device) error { return d.Disconnect(context.Background()) },
		"Kick":       func(d *Device) error { return errors.Join(d.Kick(context.Background()), d.Close()) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFarExport(t)
			k, d := connectedFar(t, f, Options{DeadTimeout: time.Hour})
			f.set(errors.New("no route"))
			f.reset()
			f.await(t, d, 3)
			start := time.Now()
			if err := end(d); err != nil {
				t.Error(err)
			}
			<-d.Done()
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("it takes %v", took)
			}
			var kicked error
			if name == "Kick" {
				kicked = d.Err()
			}
			if d.Err() != kicked || (kicked == nil) == (name == "Kick") {
				t.Errorf("ended with %v", d.Err())
			}
			dialled := f.count()
			checkClean(t, k)
			if n := f.count(); n != dialled || !isDone(d) {
				t.Errorf("%d connections are dialled after the end", n-dialled)
			}
		})
	}
}

// TestRemoteForbidden holds that a device whose kernel refuses to replace a connection is dead, not
// disconnected, and that the connection which it was to have ends.
func TestRemoteForbidden(t *testing.T) {
	f := newFarExport(t)
	k, d := connectedFar(t, f, Options{DeadTimeout: time.Hour})
	k.Fail(nbdnltest.Reconfigure, syscall.EPERM)
	f.reset()
	<-d.Done()
	if d.Err() == nil || d.State() != nbdnl.StateOrphaned {
		t.Errorf("ended with %v, %s", d.Err(), d.State())
	}
	f.hasEnded(t, 1)
	if err := d.Close(); !errors.Is(err, d.Err()) {
		t.Errorf("Close: %v, want %v", err, d.Err())
	}
	checkClean(t, k)
}

// TestRemoteRetries holds that a connection which the kernel did not take for once ends, and that
// the next one takes its place.
func TestRemoteRetries(t *testing.T) {
	f := newFarExport(t)
	k, d := connectedFar(t, f, Options{DeadTimeout: time.Hour})
	k.Fail(nbdnltest.Reconfigure, syscall.ENOMEM)
	f.reset()
	awaitReplaced(t, d, 1)
	f.hasEnded(t, 1)
	if f.count() != 3 {
		t.Errorf("%d connections were dialled, want 3", f.count())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	f.hasEnded(t, 2)
	checkClean(t, k)
}
