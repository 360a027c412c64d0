package nbdnl_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A responder is the least that can serve a device: everything succeeds, nothing is checked. This
// package can't use the real server, which must be free to use this package's.
type responder struct {
	kernel syscall.Conn // the end to pass to Connect
	ours   net.Conn     // the other one

	// data is the disk; without it reads are zeroes, and writes are forgotten. The mutex guards it.
	mu   sync.Mutex
	data []byte
	// stuck makes it stop reading, after the next request's header, until gate is closed.
	stuck atomic.Bool
	gate  chan struct{}

	writes, flushes atomic.Int64
	// unflushed counts the bytes written since the last flush.
	unflushed atomic.Int64
	// done is closed when the kernel has said that it disconnects, or the connection has ended.
	done chan struct{}
}

// Request types and magics: sections "Request message" and "Simple reply message" of the NBD
// protocol.
const (
	requestMagic = 0x25609513
	replyMagic   = 0x67446698
	cmdRead      = 0
	cmdWrite     = 1
	cmdDisc      = 2
	cmdFlush     = 3
)

// serve starts a responder without data.
func serve(t testing.TB) *responder {
	t.Helper()
	return newResponder(t).start(t)
}

func newResponder(t testing.TB) *responder {
	t.Helper()
	r := &responder{gate: make(chan struct{}), done: make(chan struct{})}
	r.kernel, r.ours = socketpair(t)
	return r
}

// start serves until the connection ends, with the test at the latest.
func (r *responder) start(t testing.TB) *responder {
	go func() {
		defer close(r.done)
		for r.answer() == nil {
		}
	}()
	t.Cleanup(func() {
		r.ours.Close()
		r.kernel.(net.Conn).Close()
		<-r.done
	})
	return r
}

// begins reports whether the disk's content begins with want.
func (r *responder) begins(want []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.HasPrefix(r.data, want)
}

// answer serves one request.
func (r *responder) answer() error {
	var req [28]byte
	if _, err := io.ReadFull(r.ours, req[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(req[:]) != requestMagic {
		return errors.New("bad request magic")
	}
	if r.stuck.Load() {
		<-r.gate
	}
	offset, length := binary.BigEndian.Uint64(req[16:]), int(binary.BigEndian.Uint32(req[24:]))
	reply := binary.BigEndian.AppendUint32(nil, replyMagic)
	reply = append(reply, 0, 0, 0, 0)
	reply = append(reply, req[8:16]...)
	switch binary.BigEndian.Uint16(req[6:]) {
	case cmdDisc:
		return io.EOF
	case cmdRead:
		block := make([]byte, length)
		r.mu.Lock()
		if r.data != nil {
			copy(block, r.data[offset:])
		}
		r.mu.Unlock()
		reply = append(reply, block...)
	case cmdWrite:
		block := make([]byte, length)
		if _, err := io.ReadFull(r.ours, block); err != nil {
			return err
		}
		r.mu.Lock()
		if r.data != nil {
			copy(r.data[offset:], block)
		}
		r.mu.Unlock()
		r.writes.Add(1)
		r.unflushed.Add(int64(length))
	case cmdFlush:
		r.flushes.Add(1)
		r.unflushed.Store(0)
	}
	_, err := r.ours.Write(reply)
	return err
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
