package blockdev

import (
	"errors"
	"io"
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// unixPair returns both ends of a connection.
func unixPair(t *testing.T) (nc, peer net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if nc, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if peer, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close(); peer.Close() })
	return nc, peer
}

var pairs = map[string]func(*testing.T) (nc, peer net.Conn){"TCP": tcpPair, "Unix": unixPair}

// ended fails the test unless a watched connection is known to have ended, and returns why.
func (w *watched) ended(t *testing.T) error {
	t.Helper()
	result := make(chan error, 1)
	go func() { result <- w.Transmit() }()
	select {
	case err := <-result:
		return err
	case <-time.After(10 * time.Second):
		t.Fatal("its end is not seen")
		return nil
	}
}

// TestWatchedKinds holds that the socket of a connection is the kernel's alone, which blocks in it,
// and that its Close is seen by the peer.
func TestWatchedKinds(t *testing.T) {
	for name, pair := range pairs {
		nc, peer := pair(t)
		w, err := newWatched(nc, func() bool { return false })
		if err != nil {
			t.Fatal(err)
		}
		if _, err := nc.Write([]byte{1}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: the connection that was handed over is open: %v", name, err)
		}
		var flags, cloexec int
		if err := control(w.socket, func(fd int) (err error) {
			if flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err == nil {
				cloexec, err = unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
			}
			return err
		}); err != nil || flags&unix.O_NONBLOCK != 0 || cloexec != unix.FD_CLOEXEC {
			t.Errorf("%s: flags %#x and %#x, %v", name, flags, cloexec, err)
		}
		if w.Disconnected() || w.Away() || w.Idle() || w.Absence() != 0 || w.Stats().InFlight != 0 {
			t.Errorf("%s: it says more than that it is watched", name)
		}
		if err := w.Close(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := w.ended(t); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: after Close: %v", name, err)
		}
		if err := control(w.socket, func(int) error { return nil }); err == nil {
			t.Errorf("%s: the socket stays open here", name)
		}
		_ = peer.SetReadDeadline(time.Now().Add(10 * time.Second))
		// With nothing left to be sent, the end of a TCP connection goes ahead of its reset.
		n, err := peer.Read(make([]byte, 1))
		if reset := name == "TCP" && errors.Is(err, syscall.ECONNRESET); n != 0 || err != io.EOF && !reset {
			t.Errorf("%s: the peer reads %d bytes, %v", name, n, err)
		}
	}
}

// TestWatchedEnds holds what is said of each end, and that the end of the device is no error.
func TestWatchedEnds(t *testing.T) {
	shut := func(w *watched, _ net.Conn) error { return w.shut() }
	closes := func(_ *watched, peer net.Conn) error { return peer.Close() }
	for name, tt := range map[string]struct {
		pair func(*testing.T) (nc, peer net.Conn)
		end  func(w *watched, peer net.Conn) error
		ends bool
		want error
	}{
		"reset": {tcpPair, func(_ *watched, peer net.Conn) error {
			return errors.Join(peer.(*net.TCPConn).SetLinger(0), peer.Close())
		}, false, syscall.ECONNRESET},
		"by the kernel":           {tcpPair, shut, false, errHungUp},
		"by the kernel, Unix":     {unixPair, shut, false, errHungUp},
		"by the server, Unix":     {unixPair, closes, false, errHungUp},
		"with the device":         {tcpPair, shut, true, nil},
		"with the device, Unix":   {unixPair, shut, true, nil},
		"with the device, closed": {unixPair, closes, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			nc, peer := tt.pair(t)
			w, err := newWatched(nc, func() bool { return tt.ends })
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			select {
			case <-w.Stopped():
				t.Error("it has ended before it was")
			default:
			}
			if err := tt.end(w, peer); err != nil {
				t.Fatal(err)
			}
			err = w.ended(t)
			<-w.Stopped()
			if err != tt.want && !(tt.want != nil && errors.Is(err, tt.want)) || w.Disconnected() != tt.ends {
				t.Errorf("it ends with %v, disconnected %t", err, w.Disconnected())
			}
		})
	}
}

// TestWatchedHalf holds that a server which only says nothing more has not ended a TCP connection.
// It is for the kernel, which reads that, to shut it down, and then it has.
func TestWatchedHalf(t *testing.T) {
	nc, peer := tcpPair(t)
	w, err := newWatched(nc, func() bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := peer.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := control(w.socket, func(fd int) error { // It returns when the end has arrived.
		n, err := unix.Read(fd, make([]byte, 1))
		if n > 0 {
			err = errors.New("something is read")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-w.Stopped():
		t.Error("half an end is taken for one")
	default:
	}
	if err := w.shut(); err != nil {
		t.Fatal(err)
	}
	if err := w.ended(t); err != errHungUp {
		t.Errorf("it ends with %v", err)
	}
}
