package blockdev

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// piped returns a device of one connection for a test in a bubble of synctest, and the client's end
// of the connection: a pipe, since time would stand still while a read of a socket waits. The
// kernel has a socket that nobody serves.
func piped(t *testing.T, b backends.Backend, o Options) (*nbdnltest.Kernel, *Device, net.Conn) {
	t.Helper()
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
	t.Cleanup(l.close)
	client, server := net.Pipe()
	t.Cleanup(func() { client.Close() })
	d.serve([]link{{conn: server}})
	if err := d.command(t.Context(), placeAt(anyIndex), l.kernel); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.conns.cut)
	return k, d, client
}

// TestCloseRefused has the kernel refuse to disconnect the device: Close waits for nothing, since
// it is no device any more.
func TestCloseRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, d, _ := piped(t, newStore(), Options{})
		k.Fail(nbdnltest.Disconnect, syscall.ENOMEM)
		begin := time.Now()
		if err := d.Close(); !errors.Is(err, syscall.ENOMEM) || !isDone(d) {
			t.Errorf("error %v, done %t", err, isDone(d))
		}
		if took := time.Since(begin); took > time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

// TestCloseHung has the kernel wait for room on a connection that the server does not read: it gets
// on when the connection is cut, which Close does while there is time for the rest.
func TestCloseHung(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, d, client := piped(t, newStore(), Options{})
		unblock := k.Block(nbdnltest.Disconnect)
		go func() {
			io.Copy(io.Discard, client) // to the cut
			unblock()
		}()
		if err := d.Close(); errors.Is(err, context.DeadlineExceeded) || !isDone(d) {
			t.Errorf("error %v, done %t", err, isDone(d))
		}
		checkClean(t, k)
	})
}

// TestChangeBounded holds that a change gives up a request that does not end, before the kernel
// gives up those that wait for the change.
func TestChangeBounded(t *testing.T) {
	for name, change := range map[string]func(*Device) error{
		"shrink": func(d *Device) error { return d.Resize(context.Background(), 512) },
		"swap":   func(d *Device) error { return d.Swap(context.Background(), newElastic()) },
	} {
		synctest.Test(t, func(t *testing.T) {
			e := newElastic()
			arrived, release := make(chan struct{}), make(chan struct{})
			e.read = func() { close(arrived); <-release }
			k, d, client := piped(t, e, Options{Timeout: 10 * time.Second})
			go io.Copy(io.Discard, client)
			client.Write(readRequest(size - 512))
			<-arrived
			begin := time.Now()
			if err := change(d); err == nil {
				t.Errorf("%s: no error", name)
			}
			if took := time.Since(begin); took >= d.Timeout() {
				t.Errorf("%s: it took %v", name, took)
			}
			checkSizes(t, k, d, size, size, size, size)
			close(release)
		})
	}
}

// TestReconfigureKnown holds that new timeouts are told as a change, and that the server answers by
// them what is sent again and again.
func TestReconfigureKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElastic()
		release := make(chan struct{})
		e.read = func() { <-release }
		_, d, _ := piped(t, e, Options{Timeout: time.Hour})
		select {
		case <-d.Changes():
		default:
		}
		timeout, dead := 5*time.Second, 6*time.Second
		if err := d.Reconfigure(t.Context(), Update{Timeout: &timeout, DeadTimeout: &dead}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-d.Changes():
		default:
			t.Error("no change was told")
		}
		var reply [16]byte
		for begin := time.Now(); reply[0] == 0 && time.Since(begin) <= timeout+dead+10*time.Second; {
			// The kernel gives up a connection after the timeout, and sends the request again.
			client, server := net.Pipe()
			c := d.export.NewConn(server, nil)
			go c.Transmit()
			client.Write(readRequest(0))
			client.SetReadDeadline(time.Now().Add(timeout))
			io.ReadFull(client, reply[:])
			client.Close()
			<-c.Stopped()
			c.Close()
		}
		if reply[7] != 5 { // NBD_EIO
			t.Errorf("reply %x, want EIO", reply)
		}
		close(release)
	})
}

// TestLeftBehindClosed holds that the kernel sees the end of a connection whose last request the
// backend does not let go of.
func TestLeftBehindClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElastic()
		arrived, release := make(chan struct{}), make(chan struct{})
		e.read = func() { close(arrived); <-release }
		_, d, client := piped(t, e, Options{DeadTimeout: time.Hour})
		d.commanding <- struct{}{} // No other connection comes.
		client.Write(readRequest(0))
		<-arrived
		client.Write(make([]byte, 28)) // which is no request
		client.SetReadDeadline(time.Now().Add(time.Second))
		if n, err := client.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%d bytes, %v", n, err)
		}
		close(release)
	})
}

// TestReconnectTooLate has the kernel take a connection of which there is no use any more: it is
// closed.
func TestReconnectTooLate(t *testing.T) {
	k, d := connectedWith(t, nbdnltest.Options{}, newStore(), Options{DeadTimeout: time.Hour})
	d.conns.cut()
	<-d.Done()
	if err := d.conns.replace(t.Context(), d.conns.all[0]); !errors.Is(err, errEnded) {
		t.Errorf("error %v, want %v", err, errEnded)
	}
	if n := k.Dead(d.Index()); n != 1 {
		t.Errorf("%d connections are dead, want the one", n)
	}
}

// TestDropRefused has the kernel refuse to disconnect a device that did not become ready: nothing
// is served any more all the same.
func TestDropRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, d, _ := piped(t, newStore(), Options{})
		k.Fail(nbdnltest.Disconnect, syscall.ENOMEM)
		if err := d.drop(t.Context(), nil); !errors.Is(err, syscall.ENOMEM) || !isDone(d) {
			t.Errorf("error %v, done %t", err, isDone(d))
		}
	})
}

// TestReadyReason holds that a device that can't be read says why the backend did not read it.
func TestReadyReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, d, client := piped(t, newElastic(), Options{})
		go io.Copy(io.Discard, client)
		d.machine.first = func(context.Context, string, string, int) error {
			client.Write(readRequest(1 << 40)) // beyond the end
			synctest.Wait()
			return syscall.EIO
		}
		err := d.ready(t.Context(), newProbe(d.use))
		if last := d.export.LastError(); last == nil || !errors.Is(err, last) || !errors.Is(err, syscall.EIO) {
			t.Errorf("error %v, want EIO, and %v", err, last)
		}
	})
}

// TestGrowAnswerLost has the kernel take the size, and its answers get lost: the error says so, and
// everybody keeps what the kernel has.
func TestGrowAnswerLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElastic()
		k, d, client := piped(t, e, Options{})
		e.kernel = func() uint64 { return k.Setting(d.Index()).Size }
		go io.Copy(io.Discard, client)
		k.Mute(nbdnltest.Reconfigure)
		k.Mute(nbdnltest.Reconfigure) // It is asked again.
		if err := d.Resize(t.Context(), 2*size); err == nil {
			t.Error("no error")
		}
		checkSizes(t, k, d, 2*size, 2*size, 2*size, 2*size)
	})
}

// TestGapNarrow holds that a wait for a connection counts as too long when it has been just short
// enough, by what was seen here: the kernel may have begun to count earlier.
func TestGapNarrow(t *testing.T) {
	for _, tt := range []struct {
		gap  time.Duration
		told bool
	}{
		{10*time.Second - 50*time.Millisecond, true},
		{9 * time.Second, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			_, d, client := piped(t, newStore(), Options{DeadTimeout: 10 * time.Second})
			d.commanding <- struct{}{} // Nothing else puts a connection there.
			client.Close()
			synctest.Wait()
			time.Sleep(tt.gap)
			_, server := net.Pipe()
			if err := d.conns.restore(d.conns.all[0], d.newServed(server, nil)); err != nil {
				t.Error(err)
			}
			if err := d.Loss(); (err != nil) != tt.told {
				t.Errorf("after %v without a connection: the loss of %v", tt.gap, err)
			}
		})
	}
}
