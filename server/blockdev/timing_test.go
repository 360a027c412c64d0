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
	d.slots = []*slot{newSlot(0, d.export.NewConn(server, nil))}
	d.alive, d.keepers = 1, 1
	go d.keep(d.slots[0])
	if err := d.command(t.Context(), placeAt(anyIndex), l.kernel); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.cut)
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

// TestShrinkBounded holds that a shrink gives up a request that does not end, before the kernel
// gives up those that wait for the shrink.
func TestShrinkBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElastic()
		arrived, release := make(chan struct{}), make(chan struct{})
		e.read = func() { close(arrived); <-release }
		k, d, client := piped(t, e, Options{Timeout: 10 * time.Second})
		go io.Copy(io.Discard, client)
		client.Write(readRequest(size - 512))
		<-arrived
		begin := time.Now()
		if err := d.Resize(t.Context(), 512); err == nil {
			t.Error("no error")
		}
		if took := time.Since(begin); took >= d.Timeout() {
			t.Errorf("it took %v", took)
		}
		checkSizes(t, k, d, size, size, size, size)
		close(release)
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
			if err := d.revive(d.slots[0], d.export.NewConn(server, nil)); err != nil {
				t.Error(err)
			}
			if err := d.Loss(); (err != nil) != tt.told {
				t.Errorf("after %v without a connection: the loss of %v", tt.gap, err)
			}
		})
	}
}
