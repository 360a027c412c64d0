package rawio

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tcpPair returns the ends of a connection.
func tcpPair(t *testing.T) (nc, peer *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	one, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	other, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	nc, peer = one.(*net.TCPConn), other.(*net.TCPConn)
	t.Cleanup(func() { nc.Close(); peer.Close() })
	return nc, peer
}

// numbered is a stream of which each byte tells where it belongs, nearly.
func numbered(off, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		at := off + i
		p[i] = byte(at) ^ byte(at>>8)*31 ^ byte(at>>16)*101
	}
	return p
}

// fill writes without blocking until nothing more goes in, and returns how much did.
func fill(t *testing.T, fd int) (written int) {
	t.Helper()
	for {
		n, err := unix.SendmsgN(fd, numbered(written, 1<<16), nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if err == unix.EAGAIN {
			return written
		}
		if err != nil {
			t.Fatal(err)
		}
		written += n
	}
}

// TestResetShared holds that the peer reads a beginning of what was written and then ECONNRESET.
// Who waits in a call on another descriptor of the socket is let go, though that stays open.
func TestResetShared(t *testing.T) {
	nc, peer := tcpPair(t)
	if err := nc.SetWriteBuffer(256 << 10); err != nil {
		t.Fatal(err)
	}
	fd, other := descriptor(t, nc), descriptor(t, nc)
	if err := unix.SetNonblock(other, false); err != nil {
		t.Fatal(err)
	}
	if err := nc.Close(); err != nil {
		t.Fatal(err)
	}
	written := fill(t, fd)
	waits := make(chan error, 2)
	go func() {
		_, err := unix.SendmsgN(other, numbered(written, 1<<20), nil, nil, unix.MSG_NOSIGNAL)
		waits <- err
	}()
	go func() {
		n, err := unix.Read(other, make([]byte, 1))
		if n > 0 {
			err = errors.New("something is read")
		}
		waits <- err // Either the end or a reset is an end.
	}()
	if err := Reset(fd); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		select {
		case err := <-waits:
			if err != nil && err != unix.EPIPE && err != unix.ECONNRESET && err != unix.ENOTCONN {
				t.Errorf("a call ends with %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("a call on the other descriptor does not return")
		}
	}
	_ = peer.SetReadDeadline(time.Now().Add(10 * time.Second))
	got, err := io.ReadAll(peer)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer reads %v in the end", err)
	}
	if len(got) >= written || !bytes.Equal(got, numbered(0, len(got))) {
		t.Errorf("the peer reads %d of %d bytes, or others", len(got), written)
	}
	_, err = unix.SendmsgN(other, []byte{1}, nil, nil, unix.MSG_NOSIGNAL)
	if err != unix.EPIPE && err != unix.ENOTCONN {
		t.Errorf("the other descriptor takes more: %v", err)
	}
}

// TestResetEnded holds that the end of what has ended, or has never been, is no error.
func TestResetEnded(t *testing.T) {
	for name, end := range map[string]func(nc, peer *net.TCPConn) error{
		"the peer has reset it": func(_, peer *net.TCPConn) error {
			return errors.Join(peer.SetLinger(0), peer.Close())
		},
		"the peer has closed it": func(_, peer *net.TCPConn) error { return peer.Close() },
		"it is shut down": func(nc, _ *net.TCPConn) error {
			return errors.Join(nc.CloseWrite(), nc.CloseRead())
		},
		"both have shut down": func(nc, peer *net.TCPConn) error {
			return errors.Join(nc.CloseWrite(), peer.CloseWrite())
		},
		"it has been reset before": func(nc, _ *net.TCPConn) error { return control(nc, Reset) },
	} {
		t.Run(name, func(t *testing.T) {
			nc, peer := tcpPair(t)
			if err := end(nc, peer); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(control(nc, Reset), control(nc, Reset)); err != nil {
				t.Error(err)
			}
			_ = nc.SetReadDeadline(time.Now().Add(10 * time.Second))
			if n, err := nc.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("it reads %d bytes, %v", n, err)
			}
		})
	}
}

// TestResetKinds holds what Reset says of sockets without a connection, and of no socket.
func TestResetKinds(t *testing.T) {
	for name, tt := range map[string]struct {
		domain int
		want   error
	}{
		"TCP":  {unix.AF_INET, nil},
		"TCP6": {unix.AF_INET6, nil},
		"Unix": {unix.AF_UNIX, nil},
	} {
		fd, err := unix.Socket(tt.domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := Reset(fd); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
		unix.Close(fd)
	}
	file, err := os.Create(t.TempDir() + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := control(file, Reset); !errors.Is(err, unix.ENOTSOCK) {
		t.Errorf("a file: %v", err)
	}
	if err := Reset(-1); !errors.Is(err, unix.EBADF) {
		t.Errorf("nothing: %v", err)
	}
}

// control calls f with a descriptor.
func control(s syscall.Conn, f func(fd int) error) error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = f(int(fd)) })
	return errors.Join(err, failed)
}

// TestResetUnixShared holds that of a Unix socket all that was written is read, and then the end,
// though another descriptor of it stays open.
func TestResetUnixShared(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	peer := os.NewFile(uintptr(fds[1]), "peer")
	defer peer.Close()
	defer unix.Close(fds[0])
	other, err := unix.FcntlInt(uintptr(fds[0]), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	written := fill(t, fds[0])
	if err := errors.Join(Reset(fds[0]), Reset(fds[0])); err != nil {
		t.Error(err)
	}
	got, err := io.ReadAll(peer)
	if err != nil || !bytes.Equal(got, numbered(0, written)) {
		t.Errorf("the peer reads %d of %d bytes, or others, and %v", len(got), written, err)
	}
	if n, err := unix.SendmsgN(other, []byte{1}, nil, nil, unix.MSG_NOSIGNAL); err != unix.EPIPE {
		t.Errorf("the other descriptor takes %d bytes more: %v", n, err)
	}
}
