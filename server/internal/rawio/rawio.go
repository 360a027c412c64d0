// Package rawio moves bytes through a stream socket with as little as possible around the system
// calls. It is the only place of the serving side that uses package unsafe or raw system calls.
//
// There are three implementations of [Conn]. One makes non-blocking system calls of its own on the
// descriptor of a TCP or Unix socket and parks in the runtime's poller (socket_linux.go). One is
// for TLS connections (tls.go). The third is for everything else that is a net.Conn (portable.go):
// a pipe, other systems, a build with the race detector, which does not see raw system calls, and a
// build with the tag nbd_portable. They behave alike, so whoever uses them is written once.
package rawio

import (
	"crypto/tls"
	"io"
	"net"
)

// MinLend is the least that a Lender must have room for, in bytes.
const MinLend = 4 << 10

// A Lender has the memory that Recv receives into.
type Lender interface {
	// Lend returns room for at least MinLend bytes.
	Lend() []byte
	// Yield is asked when there is nothing to receive yet: whether to give the processor away once
	// before Recv waits in earnest. still is that of Park.
	Yield(still bool) bool
	// Park tells that what Lend returned is not needed now: Recv is going to wait. Before anything
	// is returned it calls Lend again. So an idle connection need not hold on to a large buffer.
	// still tells that Lend is called again even before anything is received from the socket.
	Park(still bool)
	// Drained tells that with what Recv is about to return there was nothing more to receive. Not
	// every Conn can know that.
	Drained()
}

// A Waiter is told that a call is going to wait for the peer, or, where that can't be known, that
// it may.
type Waiter interface {
	Wait()
}

// A Conn is a connected stream socket. One goroutine may receive while another one sends. An error
// of a method does not lose bytes that were received. Deadlines and Close of the net.Conn work as
// for its own methods, and their errors are the same.
type Conn interface {
	// Recv waits until there is something to receive, and receives once. The error is io.EOF at the
	// end of the stream.
	Recv(l Lender) (int, error)
	// ReadFull receives until p is full, and calls w once if it has to wait for that. With an error
	// it says how much of p was filled; io.EOF is one at any place.
	ReadFull(p []byte, w Waiter) (int, error)
	// Send sends all of v. more says that the rest of the message follows at once. With an error it
	// says how many bytes were sent, or -1 if that is not known; syscall.EFAULT is one if memory of
	// v is not there, and breaks nothing by itself.
	Send(v *Vec, more bool) (int, error)
	// SendPages sends all of p, which is to be dropped afterwards. It fails with
	// errors.ErrUnsupported if SendsPages is false.
	SendPages(p *Pages) error
	// SendsPages reports whether SendPages works.
	SendsPages() bool
	// Window is how many bytes it is worth to receive at once.
	Window() int
	// Direct is the length, in bytes, from which on it is worth another system call to receive data
	// in the place where they are to stay, instead of copying them there.
	Direct() int
}

// New returns the best Conn for nc.
func New(nc net.Conn) Conn {
	// By type and not by what it implements: a type that embeds a socket may well have a Read that
	// does more.
	switch nc := nc.(type) {
	case *net.UnixConn:
		if raw, err := nc.SyscallConn(); err == nil {
			return newSocket(nc, raw)
		}
	case *net.TCPConn:
		if raw, err := nc.SyscallConn(); err == nil {
			return newSocket(nc, raw)
		}
	case *tls.Conn:
		return newTLS(nc)
	}
	return newPortable(nc)
}

// A Vec is a message in pieces, which are sent from where they are. The zero value is empty.
type Vec struct {
	Bufs    [][]byte
	scratch scratch // of the implementation
}

// Add appends p, by reference.
func (v *Vec) Add(p []byte) { v.Bufs = append(v.Bufs, p) }

// Part returns bytes from to to of v.
func (v *Vec) Part(from, to int) (part Vec) {
	for _, p := range v.Bufs {
		if first, last := max(from, 0), min(to, len(p)); first < last {
			part.Add(p[first:last])
		}
		from, to = from-len(p), to-len(p)
	}
	return part
}

// Truncate drops all pieces but the first n.
func (v *Vec) Truncate(n int) {
	clear(v.Bufs[n:]) // Whoever owns the memory may want to be rid of it.
	v.Bufs = v.Bufs[:n]
}

// fillFrom is io.ReadFull, except that the end of the stream is io.EOF at any place.
func fillFrom(r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = r.Read(p[n:])
		n += m
	}
	if n == len(p) {
		err = nil
	}
	return n, err
}
