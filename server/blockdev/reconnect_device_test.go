package blockdev

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// await waits for a state of the device, by what it tells of changes.
func awaitState(t *testing.T, d *Device, want nbdnl.State) {
	t.Helper()
	limit := time.After(10 * time.Second)
	for d.State() != want {
		select {
		case <-d.Changes():
		case <-limit:
			t.Fatalf("%s, %d alive, want %s", d.State(), d.Alive(), want)
		}
	}
}

// TestReconnect holds that connections that die are replaced, one or all of them, and that what
// they have served is not forgotten.
func TestReconnect(t *testing.T) {
	for _, tt := range []struct {
		name        string
		connections int
		lose        []int
		deadTimeout time.Duration
	}{
		{"one of two", 2, []int{1}, 0},
		{"one of two, that could wait", 2, []int{0}, 5 * time.Second},
		{"the only one", 1, []int{0}, 5 * time.Second},
		{"all of three", 3, []int{2, 0, 1}, 5 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := Options{Connections: tt.connections, DeadTimeout: tt.deadTimeout}
			k, d := connectedWith(t, nbdnltest.Options{}, newStore(), o)
			for round := range 3 {
				before := d.Alive()
				if before != tt.connections || d.State() != nbdnl.StateLive {
					t.Fatalf("round %d: %s, %d alive", round, d.State(), before)
				}
				commands := k.Commands(nbdnltest.Reconfigure)
				for _, number := range tt.lose {
					d.lose(number)
				}
				for k.Commands(nbdnltest.Reconfigure) < commands+len(tt.lose) || d.State() != nbdnl.StateLive {
					select {
					case <-d.Changes():
					case <-time.After(10 * time.Millisecond):
					case <-d.Done():
						t.Fatal(d.Err())
					}
				}
			}
			if st := k.Setting(d.Index()); st.Sockets != tt.connections {
				t.Errorf("the kernel has %d connections", st.Sockets)
			}
			if err := d.Disconnect(t.Context()); err != nil {
				t.Error(err)
			}
			if d.Err() != nil || d.State() != nbdnl.StateIdle {
				t.Errorf("ended with %v, %s", d.Err(), d.State())
			}
			checkClean(t, k)
		})
	}
}

// TestReconnectRetries lets attempts fail, and drops one silently.
func TestReconnectRetries(t *testing.T) {
	k, d := connectedWith(t, nbdnltest.Options{}, newStore(), Options{Connections: 2})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := d.conns.replace(ctx, d.conns.all[0]); err == nil || d.Alive() != 2 {
		t.Errorf("with none dead: %v, %d alive", err, d.Alive())
	}
	before := k.Commands(nbdnltest.Reconfigure)
	k.Fail(nbdnltest.Reconfigure, syscall.ENOMEM)
	d.lose(0)
	awaitState(t, d, nbdnl.StateDegraded)
	awaitState(t, d, nbdnl.StateLive)
	if n := k.Commands(nbdnltest.Reconfigure) - before; n < 2 {
		t.Errorf("%d commands, want the one that failed, and another", n)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestReconnectUndone has the kernel shut down connections right after it has taken them, while
// that is looked out for and when it is not any more: each is replaced by another one, of which the
// last stays.
func TestReconnectUndone(t *testing.T) {
	for name, undo := range map[string][]time.Duration{
		"at once":         {0},
		"soon":            {50 * time.Millisecond, time.Millisecond, 20 * time.Millisecond},
		"late":            {time.Second},
		"late, then soon": {800 * time.Millisecond, time.Millisecond, 700 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k, d := connectedWith(t, nbdnltest.Options{}, newStore(), Options{DeadTimeout: time.Hour})
			before := k.Commands(nbdnltest.Reconfigure)
			k.Undo(undo...)
			d.lose(0)
			want := before + len(undo) + 1
			limit := time.After(20 * time.Second)
			for k.Commands(nbdnltest.Reconfigure) < want || d.State() != nbdnl.StateLive {
				select {
				case <-d.Changes():
				case <-time.After(10 * time.Millisecond):
				case <-limit:
					n := k.Commands(nbdnltest.Reconfigure)
					t.Fatalf("%s after %d commands, want %d", d.State(), n-before, want-before)
				}
			}
			if n := k.Commands(nbdnltest.Reconfigure); n != want || k.Dead(d.Index()) != 0 {
				t.Errorf("%d commands, want %d; %d connections are dead", n-before, want-before, k.Dead(d.Index()))
			}
			if err := d.Disconnect(t.Context()); err != nil {
				t.Error(err)
			}
			checkClean(t, k)
		})
	}
}

// TestReconnectCounts holds that what the connections before the last one have served stays
// counted.
func TestReconnectCounts(t *testing.T) {
	k, d := connectedWith(t, nbdnltest.Options{}, newStore(), Options{DeadTimeout: time.Hour})
	d.conns.mu.Lock()
	d.conns.all[0].past.Read.Requests = 7
	d.conns.mu.Unlock()
	before := k.Commands(nbdnltest.Reconfigure)
	d.lose(0)
	for k.Commands(nbdnltest.Reconfigure) == before {
		<-time.After(time.Millisecond)
	}
	awaitState(t, d, nbdnl.StateLive)
	if n := d.Stats()[0].Read.Requests; n != 7 {
		t.Errorf("%d reads are counted, want 7", n)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestReconnectIdle holds that connections which die one after the other without having carried
// anything leave the kernel some peace.
func TestReconnectIdle(t *testing.T) {
	k, d := connectedWith(t, nbdnltest.Options{}, newStore(), Options{DeadTimeout: time.Hour})
	before := k.Commands(nbdnltest.Reconfigure)
	const late = 600 * time.Millisecond // later than Reconfigure looks out for
	k.Undo(late)
	begin := time.Now()
	d.lose(0)
	for k.Commands(nbdnltest.Reconfigure) < before+2 {
		select {
		case <-d.Changes():
		case <-time.After(time.Millisecond):
		case <-d.Done():
			t.Fatal(d.Err())
		}
	}
	if took := time.Since(begin); took < late+2*idlePause {
		t.Errorf("the second attempt came after %v", took)
	}
	awaitState(t, d, nbdnl.StateLive)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestReconnectPersists holds that a device goes on replacing a connection for as long as another
// one serves, even when the time is over in which the kernel would fail requests if none did.
func TestReconnectPersists(t *testing.T) {
	k, d := connectedWith(t, nbdnltest.Options{}, newStore(), Options{Connections: 2})
	over := time.Nanosecond // before the first attempt
	d.conns.setTimeouts(&over, nil)
	before := k.Commands(nbdnltest.Reconfigure)
	k.Fail(nbdnltest.Reconfigure, syscall.ENOMEM)
	unblock := k.Block(nbdnltest.Reconfigure)
	d.lose(0)
	awaitState(t, d, nbdnl.StateDegraded)
	unblock()
	awaitState(t, d, nbdnl.StateLive)
	if n := k.Commands(nbdnltest.Reconfigure) - before; n < 2 {
		t.Errorf("%d commands, want the one that failed, and another", n)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// manual returns a device of one connection whose kernel's end the test has in its hands, too.
func manual(t *testing.T, b backends.Backend, o Options) (*nbdnltest.Kernel, *Device, *os.File) {
	k, m, lab := lab(t)
	o.Client = lab.Client
	d, err := m.newDevice(b, o)
	if err != nil {
		t.Fatal(err)
	}
	l, err := openLinks(1, ampleSendBuffer, d.log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.closeKernelEnds)
	d.serve(l.ends())
	if err := d.command(t.Context(), placeAt(anyIndex), l.kernel); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return k, d, l.kernelEnds[0]
}

// shutdown is what the kernel does to a connection that has exceeded its timeout.
func shutdown(t *testing.T, end *os.File) {
	t.Helper()
	c, err := net.FileConn(end)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	u := c.(*net.UnixConn)
	if err := errors.Join(u.CloseWrite(), u.CloseRead()); err != nil {
		t.Fatal(err)
	}
}

// TestReconnectBusy holds that a new connection is offered while the backend is at work for the old
// one, that the counts of both are the device's, and that the device is not done before the backend
// has let go of both.
func TestReconnectBusy(t *testing.T) {
	b := newElastic()
	arrived, release := make(chan struct{}), make(chan struct{})
	b.read = func() { close(arrived); <-release }
	k, d, kernel := manual(t, b, Options{DeadTimeout: 30 * time.Second})
	kernel.Write(readRequest(0))
	<-arrived
	d.conns.mu.Lock()
	idle := d.conns.all[0].conn.Idle()
	d.conns.mu.Unlock()
	if idle {
		t.Error("a connection that carries a request is taken for idle")
	}
	b.read = nil
	shutdown(t, kernel)
	for k.Commands(nbdnltest.Reconfigure) == 0 || d.State() != nbdnl.StateLive {
		select {
		case <-d.Changes():
		case <-d.Done():
			t.Fatal("done while a request is in the backend")
		}
	}
	if n := k.Commands(nbdnltest.Reconfigure); n != 1 {
		t.Errorf("%d commands, want 1", n)
	}
	if s := d.Stats(); len(s) != 1 || s[0].InFlight != 1 {
		t.Errorf("stats %+v", s)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := d.CloseContext(ctx); !errors.Is(err, context.DeadlineExceeded) || isDone(d) {
		t.Errorf("while a request is in the backend: done %t, Close: %v", isDone(d), err)
	}
	close(release)
	<-d.Done()
	if s := d.Stats(); len(s) != 1 || s[0].Read.Requests != 1 || d.Export().Stats().Read.Requests != 1 {
		t.Errorf("stats %+v, of the export %+v", s, d.Export().Stats())
	}
	checkClean(t, k)
}

// TestReconnectExpires holds that a device whose connections can't be replaced in time ends, as one
// that need not wait.
func TestReconnectExpires(t *testing.T) {
	k, d := connectedWith(t, nbdnltest.Options{}, newStore(), Options{Timeout: time.Second, DeadTimeout: time.Second})
	unblock := k.Block(nbdnltest.Reconfigure)
	start := time.Now()
	d.lose(0)
	awaitState(t, d, nbdnl.StateWaiting)
	<-d.Done()
	if took := time.Since(start); took < 2*time.Second || took > 10*time.Second {
		t.Errorf("done after %v, want the sum of the timeouts", took)
	}
	if !errors.Is(d.Err(), net.ErrClosed) || d.State() != nbdnl.StateOrphaned {
		t.Errorf("ended with %v, %s", d.Err(), d.State())
	}
	unblock()
	if err := d.Close(); !errors.Is(err, d.Err()) {
		t.Errorf("Close: %v, want %v", err, d.Err())
	}
	checkClean(t, k)
}

// TestReconnectExpiresLate has the time run out at the moment in which a new connection is there:
// the device goes on, and can be reconnected again.
func TestReconnectExpiresLate(t *testing.T) {
	k, d := connectedWith(t, nbdnltest.Options{}, newStore(), Options{DeadTimeout: time.Hour})
	var late *expiry
	for range 2 {
		unblock := k.Block(nbdnltest.Reconfigure)
		d.lose(0)
		awaitState(t, d, nbdnl.StateWaiting)
		if late != nil {
			d.conns.expire(late) // It is not that of this wait.
		}
		d.conns.mu.Lock()
		late = d.conns.expiry
		d.conns.mu.Unlock()
		unblock()
		awaitState(t, d, nbdnl.StateLive)
		d.conns.expire(late)
		if d.conns.reconnecting.Err() != nil {
			t.Fatalf("given up: %v", context.Cause(d.conns.reconnecting))
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	checkClean(t, k)
}

// TestReconnectGone holds that a device is not reconnected that somebody has disconnected
// meanwhile, or that this process may not reconnect any more.
func TestReconnectGone(t *testing.T) {
	k, d := connectedWith(t, nbdnltest.Options{}, newStore(), Options{DeadTimeout: time.Hour})
	other := k.Client()
	k.Fail(nbdnltest.Reconfigure, syscall.ENOMEM)
	d.lose(0)
	if err := other.Drop(t.Context(), d.Index(), d.Identifier()); err != nil {
		t.Error(err)
	}
	<-d.Done()
	if err := d.Close(); !errors.Is(err, d.Err()) {
		t.Errorf("Close: %v, want %v", err, d.Err())
	}
	checkClean(t, k)

	k, d = connectedWith(t, nbdnltest.Options{}, newStore(), Options{DeadTimeout: time.Hour})
	k.Fail(nbdnltest.Reconfigure, syscall.EPERM)
	d.lose(0)
	<-d.Done()
	if err := d.Close(); !errors.Is(err, d.Err()) {
		t.Errorf("Close: %v, want %v", err, d.Err())
	}
	checkClean(t, k)
}

// TestCloseWaiting ends devices that wait for a connection. That it never came is told by Close,
// unless it was meant.
func TestCloseWaiting(t *testing.T) {
	for name, end := range map[string]func(*Device) error{
		"Close":      (*Device).Close,
		"Disconnect": func(d *Device) error { return d.Disconnect(context.Background()) },
		"Kick":       func(d *Device) error { return errors.Join(d.Kick(context.Background()), d.Close()) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newElastic()
			arrived, release := make(chan struct{}), make(chan struct{})
			b.read = func() { close(arrived); <-release }
			k, d, kernel := manual(t, b, Options{DeadTimeout: time.Hour})
			d.commanding <- struct{}{} // Else it does not wait for long.
			defer func() { <-d.commanding }()
			kernel.Write(readRequest(0))
			<-arrived
			shutdown(t, kernel)
			awaitState(t, d, nbdnl.StateWaiting)
			time.AfterFunc(100*time.Millisecond, func() { close(release) })
			err := end(d)
			<-d.Done()
			if told := err != nil; told != (name == "Close") || told && !errors.Is(err, d.Err()) {
				t.Errorf("error %v, and of the device %v", err, d.Err())
			}
			checkClean(t, k)
		})
	}
}
