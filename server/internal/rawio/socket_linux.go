//go:build (amd64 || arm64) && !race && !nbd_portable

package rawio

import (
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// socketWindow is about what fits a processor's second-level cache together with what is done
	// with it.
	socketWindow = 512 << 10
	// maxVec is IOV_MAX of <linux/uio.h>: sendmsg takes no more pieces at once.
	maxVec = 1024
	// sendBuffer, in bytes, is what a Unix socket takes before it makes the sender wait for the
	// peer; the kernel doubles it (sk_setsockopt). With its default, 208 KiB by its own count,
	// which is of pages, every reply of 128 KiB has both sides wait for each other: with this,
	// throughput on one processor is 1.1 of that from memory (128 KiB and 1 MiB), and 1.4 from the
	// page cache, of which only references lie in the buffer. More gains nothing. For 4 KiB it
	// makes no difference.
	sendBuffer = 1 << 20
	// directUnix and directTCP are what Direct says. Of writes of 128 KiB to memory, on one
	// processor, a Unix socket does 1.2 times as many with the lower one, if they are framed as the
	// kernel does, and 1.02 times if not; TCP does 1.06 and 1.08 times as many with the higher one.
	directUnix = 64 << 10
	directTCP  = 512 << 10
)

// A socket makes its system calls with RawSyscall, of which the scheduler learns nothing. That is
// right for calls that cannot sleep, and these cannot: the descriptor is non-blocking, net has made
// it so and never lends it in another way, and each call says MSG_DONTWAIT besides. They take as
// long as copying takes, bounded by the socket's buffers. In exchange the scheduler does not take
// the processor away in the middle of a copy. They run inside a syscall.RawConn's Read or Write,
// which keeps the descriptor from being closed, and parks in the poller when the call would have
// waited.
//
// The functions passed to Read and Write are made once: a method value at each call would be an
// allocation.
type socket struct {
	raw    syscall.RawConn
	direct int

	in struct { // of Recv
		lender Lender
		n      int
		err    error
		try    func(fd uintptr) bool
	}
	full struct { // of ReadFull
		p      []byte
		waiter Waiter // nil: it knows
		n      int
		err    error
		try    func(fd uintptr) bool
	}
	out struct { // of Send
		rest  []syscall.Iovec
		n     int
		flags uintptr
		err   error
		try   func(fd uintptr) bool
	}
	pages struct { // of SendPages
		from *Pages
		err  error
		try  func(fd uintptr) bool
	}
}

// scratch is a Vec in the form that the kernel wants.
type scratch struct {
	iovecs []syscall.Iovec
}

func newSocket(nc net.Conn, raw syscall.RawConn) Conn {
	c := &socket{raw: raw, direct: directTCP}
	if _, ok := nc.(*net.UnixConn); ok { // TCP adapts its buffer to the path, unless it is told a size.
		c.direct = directUnix
		widen(raw)
	}
	c.in.try, c.full.try, c.out.try, c.pages.try = c.tryRecv, c.tryFull, c.trySend, c.trySendPages
	return c
}

// widen asks for the whole sendBuffer, and without the privilege for that (CAP_NET_ADMIN) for what
// net.core.wmem_max allows of it. A socket that stays as it is works, too.
func widen(raw syscall.RawConn) {
	_ = raw.Control(func(fd uintptr) {
		if syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUFFORCE, sendBuffer) != nil {
			_ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, sendBuffer)
		}
	})
}

func (c *socket) Window() int      { return socketWindow }
func (c *socket) Direct() int      { return c.direct }
func (c *socket) SendsPages() bool { return true }

// asks tells that recv knows what there is.
const asks = true

// yield gives the processor away once.
func yield() { _, _, _ = syscall.RawSyscall(syscall.SYS_SCHED_YIELD, 0, 0, 0) }

// recv is recv(2). The error is syscall.EAGAIN when there is nothing to receive.
func recv(fd uintptr, p []byte) (int, error) {
	for {
		n, _, e := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd,
			uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), syscall.MSG_DONTWAIT, 0, 0)
		switch {
		case e == syscall.EINTR:
		case e == syscall.EAGAIN:
			return 0, syscall.EAGAIN
		case e != 0:
			return 0, os.NewSyscallError("recv", e)
		case n == 0:
			return 0, io.EOF
		default:
			return int(n), nil
		}
	}
}

func (c *socket) Recv(l Lender) (int, error) {
	c.in.lender, c.in.n, c.in.err = l, 0, nil
	err := c.raw.Read(c.in.try)
	c.in.lender = nil
	if err != nil {
		return 0, err
	}
	return c.in.n, c.in.err
}

func (c *socket) tryRecv(fd uintptr) bool {
	p := c.in.lender.Lend()
	c.in.n, c.in.err = recv(fd, p)
	if c.in.err == syscall.EAGAIN && c.in.lender.Yield(true) {
		yield()
		p = c.in.lender.Lend()
		c.in.n, c.in.err = recv(fd, p)
	}
	if c.in.err == syscall.EAGAIN {
		c.in.lender.Park(true)
		return false
	}
	if c.in.n < len(p) {
		c.in.lender.Drained()
	}
	return true
}

func (c *socket) ReadFull(p []byte, w Waiter) (int, error) {
	c.full.p, c.full.waiter, c.full.n, c.full.err = p, w, 0, nil
	err := c.raw.Read(c.full.try)
	c.full.p, c.full.waiter = nil, nil
	if err == nil {
		err = c.full.err
	}
	return c.full.n, err
}

func (c *socket) tryFull(fd uintptr) bool {
	for c.full.n < len(c.full.p) {
		rest := c.full.p[c.full.n:]
		n, err := recv(fd, rest[:min(len(rest), socketWindow)])
		if err == syscall.EAGAIN {
			if c.full.waiter != nil {
				c.full.waiter.Wait()
				c.full.waiter = nil
			}
			return false
		}
		if err != nil {
			c.full.err = err
			return true
		}
		c.full.n += n
	}
	return true
}

func (c *socket) Send(v *Vec, more bool) (int, error) {
	iovecs := v.scratch.iovecs[:0]
	for _, p := range v.Bufs {
		if len(p) > 0 {
			iovecs = append(iovecs, syscall.Iovec{Base: unsafe.SliceData(p), Len: uint64(len(p))})
		}
	}
	v.scratch.iovecs = iovecs
	c.out.rest, c.out.n, c.out.err = iovecs, 0, nil
	c.out.flags = syscall.MSG_DONTWAIT | syscall.MSG_NOSIGNAL
	if more {
		c.out.flags |= msgMore
	}
	err := c.raw.Write(c.out.try)
	if err == nil {
		err = c.out.err
	}
	c.out.rest = nil
	clear(iovecs) // They hold on to memory that may be the backend's.
	return c.out.n, err
}

// msgMore is MSG_MORE of <linux/socket.h>, which package syscall does not know.
const msgMore = 0x8000

func (c *socket) trySend(fd uintptr) bool {
	for len(c.out.rest) > 0 {
		msg := syscall.Msghdr{Iov: &c.out.rest[0], Iovlen: uint64(min(len(c.out.rest), maxVec))}
		n, _, e := syscall.RawSyscall(syscall.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&msg)), c.out.flags)
		switch e {
		case 0:
			c.sent(uint64(n))
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			c.out.err = os.NewSyscallError("sendmsg", e)
			return true
		}
	}
	return true
}

// sent takes n bytes off the rest.
func (c *socket) sent(n uint64) {
	c.out.n += int(n)
	for i := range c.out.rest {
		v := &c.out.rest[i]
		if n < v.Len {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.Len -= n
			c.out.rest = c.out.rest[i:]
			return
		}
		n -= v.Len
	}
	c.out.rest = nil
}

func (c *socket) SendPages(p *Pages) error {
	c.pages.from, c.pages.err = p, nil
	err := c.raw.Write(c.pages.try)
	c.pages.from = nil
	if err == nil {
		err = c.pages.err
	}
	return err
}

// trySendPages cannot sleep any more than the others: the pages are there, and nobody else knows
// the pipe.
func (c *socket) trySendPages(fd uintptr) bool {
	p := c.pages.from
	for i := range p.parts[:p.used] {
		part := &p.parts[i]
		for part.left > 0 {
			flags := uintptr(unix.SPLICE_F_NONBLOCK)
			if part.left < p.left {
				flags |= unix.SPLICE_F_MORE
			}
			n, _, e := syscall.RawSyscall6(
				syscall.SYS_SPLICE, uintptr(part.pipe.r), 0, fd, 0, uintptr(part.left), flags,
			)
			switch {
			case e == syscall.EINTR:
			case e == syscall.EAGAIN:
				return false
			case e != 0:
				c.pages.err = os.NewSyscallError("splice", e)
				return true
			case n == 0:
				// The kernel does not send a page that has lost its content
				// (page_cache_pipe_buf_confirm). Truncation is no way to that; some network file
				// systems have some after an error of writing.
				c.pages.err = io.ErrUnexpectedEOF
				return true
			default:
				part.left -= int(n)
				p.left -= int(n)
			}
		}
	}
	return true
}
