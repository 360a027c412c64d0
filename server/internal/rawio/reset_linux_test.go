package rawio

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// descriptor returns a descriptor of its own for a socket.
func descriptor(t *testing.T, s syscall.Conn) int {
	t.Helper()
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd := -1
	err = raw.Control(func(orig uintptr) { fd, _ = unix.FcntlInt(orig, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil || fd < 0 {
		t.Fatal(fd, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// TestResetTCP holds that what a socket has not sent is not sent any more, that the peer learns of
// it, and that the socket has ended for all who have it.
func TestResetTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()

	// More than the peer takes without reading.
	written := int64(0)
	for written == 0 || err == nil {
		var n int
		_ = nc.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, err = nc.Write(make([]byte, 1<<20))
		written += int64(n)
	}
	fd := descriptor(t, nc.(*net.TCPConn))
	if err := Reset(fd); err != nil {
		t.Fatal(err)
	}
	_ = peer.SetReadDeadline(time.Now().Add(10 * time.Second))
	read, err := io.Copy(io.Discard, peer)
	if !errors.Is(err, syscall.ECONNRESET) || read >= written {
		t.Errorf("the peer reads %d of %d bytes, then %v", read, written, err)
	}
	_ = nc.SetWriteDeadline(time.Time{})
	if _, err := nc.Write([]byte{1}); err == nil {
		t.Error("the socket goes on")
	}
	if err := Reset(fd); err != nil {
		t.Errorf("once more: %v", err)
	}
}

// TestResetUnix holds that a Unix socket has ended, with what was sent delivered.
func TestResetUnix(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	if n, err := unix.Write(fds[0], []byte("sent")); n != 4 || err != nil {
		t.Fatal(n, err)
	}
	if err := Reset(fds[0]); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 10)
	if n, err := unix.Read(fds[1], p); string(p[:n]) != "sent" || err != nil {
		t.Errorf("the peer reads %q, %v", p[:n], err)
	}
	if n, err := unix.Read(fds[1], p); n != 0 || err != nil {
		t.Errorf("then the peer reads %q, %v", p[:n], err)
	}
}
