package nbdnl_test

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A responder is the least that can serve a device: reads are zeroes, writes are forgotten, everything
// succeeds. This package can't use the real server, which must be free to use this package's.
type responder struct {
	// kernel is the end to pass to Connect.
	kernel syscall.Conn
	// ours is the other one.
	ours net.Conn
	// done is closed when the kernel has disconnected or the connection has ended.
	done chan struct{}
	// flushes counts the flush requests that were answered.
	flushes atomic.Int64
	// frozen, when it is set, keeps replies back until it is closed.
	frozen chan struct{}
}

// Request types and magics: sections "Request message" and "Simple reply message" of the NBD protocol.
const (
	requestMagic = 0x25609513
	replyMagic   = 0x67446698
	cmdRead      = 0
	cmdWrite     = 1
	cmdDisc      = 2
	cmdFlush     = 3
)

// serve starts a responder, which ends with the test at the latest.
func serve(t testing.TB) *responder { return serveFrozen(t, nil) }

func serveFrozen(t testing.TB, frozen chan struct{}) *responder {
	t.Helper()
	kernel, ours := socketpair(t)
	r := &responder{kernel: kernel, ours: ours, done: make(chan struct{}), frozen: frozen}
	go r.loop()
	t.Cleanup(func() {
		ours.Close()
		kernel.Close()
		<-r.done
	})
	return r
}

func (r *responder) loop() {
	defer close(r.done)
	buf := make([]byte, 1<<20)
	for {
		var req [28]byte
		if _, err := io.ReadFull(r.ours, req[:]); err != nil || binary.BigEndian.Uint32(req[:]) != requestMagic {
			return
		}
		length := int(binary.BigEndian.Uint32(req[24:]))
		reply := binary.BigEndian.AppendUint32(nil, replyMagic)
		reply = append(reply, 0, 0, 0, 0)
		reply = append(reply, req[8:16]...)
		switch binary.BigEndian.Uint16(req[6:]) {
		case cmdDisc:
			return
		case cmdRead:
			reply = append(reply, make([]byte, length)...)
		case cmdWrite:
			for n := length; n > 0; n -= min(n, len(buf)) {
				if _, err := io.ReadFull(r.ours, buf[:min(n, len(buf))]); err != nil {
					return
				}
			}
		case cmdFlush:
			r.flushes.Add(1)
		}
		if r.frozen != nil {
			<-r.frozen
		}
		if _, err := r.ours.Write(reply); err != nil {
			return
		}
	}
}

// socketpair returns a pair of connected Unix stream sockets.
func socketpair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}
