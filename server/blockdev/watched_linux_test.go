package blockdev

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// tcpPair returns both ends of a connection.
func tcpPair(t *testing.T) (nc, peer net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if nc, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if peer, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close(); peer.Close() })
	return nc, peer
}

// TestWatchedClose holds that what the kernel has not sent over a connection is not sent any more
// after its Close, though the kernel still has the socket.
func TestWatchedClose(t *testing.T) {
	nc, peer := tcpPair(t)
	written := int64(0)
	var err error
	for written == 0 || err == nil { // more than the peer takes without reading
		var n int
		_ = nc.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, err = nc.Write(make([]byte, 1<<20))
		written += int64(n)
	}
	w, err := newWatched(nc, func() bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	kernels := -1
	if err := control(w.socket, func(fd int) (err error) {
		kernels, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(kernels)
	ended := make(chan error, 1)
	go func() { ended <- w.Transmit() }()
	if err := errors.Join(w.Close(), w.Close()); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, net.ErrClosed) && !errors.Is(err, errHungUp) {
		t.Errorf("Transmit: %v", err)
	}
	_ = peer.SetReadDeadline(time.Now().Add(10 * time.Second))
	read, err := io.Copy(io.Discard, peer)
	if !errors.Is(err, syscall.ECONNRESET) || read >= written {
		t.Errorf("the peer reads %d of %d bytes, then %v", read, written, err)
	}
}

// TestWatchedRefused holds that the kernel gets no connection but one of a socket that it knows.
func TestWatchedRefused(t *testing.T) {
	nc, peer := net.Pipe()
	defer peer.Close()
	if _, err := newWatched(nc, nil); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a pipe: %v", err)
	}
	if _, err := nc.Write([]byte{1}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("it is not closed: %v", err)
	}
}

// TestRemoteHeld holds that a device which is ended although somebody has it open has ended in
// order.
func TestRemoteHeld(t *testing.T) {
	f := newFarExport(t)
	k, d := connectedFar(t, f, Options{DeadTimeout: time.Hour})
	_, release := k.Hold(d.Index())
	var busy *nbdnl.BusyError
	if err := d.Close(); err != nil && !errors.As(err, &busy) {
		t.Error(err)
	}
	<-d.Done()
	if d.Err() != nil || d.Loss() != nil {
		t.Errorf("ended with %v, %v", d.Err(), d.Loss())
	}
	release()
	checkClean(t, k)
}
