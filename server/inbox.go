package server

import (
	"io"
	"slices"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/rawio"
	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// largeWrite is the length in bytes from which on the payload of a WRITE does not have to pass
	// through the inbox.
	largeWrite = 64 << 10
	// smallWindow is how much to receive at once between large writes whose payload is worth to be
	// received in its place (rawio.Conn.Direct): hardly more than the next header, so that the
	// payload behind it arrives there instead of being copied.
	smallWindow = rawio.MinLend
	// maxStub is how many bytes of an incomplete request an idle connection keeps without a buffer
	// for them.
	maxStub = 64
)

// An inbox is the receiving side of a connection. It never loses a byte: what was received and not
// consumed can be taken out again, so that another process can go on where this one stopped. It has
// a buffer only while there is something to do, and takes a burst of pipelined requests into it
// with one system call. Used by one goroutine.
type inbox struct {
	io     rawio.Conn
	pool   *buffers
	ahead  []byte // received by an earlier owner of the connection; comes before what io has
	full   int    // how much to receive at once in general, in bytes
	window int    // and now
	header int    // how long the header of a request is, in bytes

	buf        *buffer
	start, end int // buf.bytes[start:end] was received and is not consumed

	stub    [maxStub]byte // stands in for buf while that is nil
	stubLen int

	age     age
	yields  yields
	before  int64         // since, when waiting began
	waiting time.Duration // when readFull began to wait; 0 if it does not

	ledger  ledger
	resting bool // the loop waits, and the ledger does not count it

	// since is when the requests were received that are being executed, by clock(); 0 while it is
	// the client that is waited for. Others may load it.
	since atomic.Int64
}

// arrived returns when the requests that are being executed were received. Time that was spent
// waiting for the rest of the payload of one of them is left out.
func (in *inbox) arrived() time.Duration { return time.Duration(in.since.Load()) }

// received returns the bytes that are there to be consumed. They are valid until the next call of a
// method but take.
func (in *inbox) received() []byte {
	if in.buf == nil {
		return in.stub[:in.stubLen]
	}
	return in.buf.bytes[in.start:in.end]
}

// expect adapts to the request that comes next. here tells, of a large write, that its payload is
// wanted in the inbox.
func (in *inbox) expect(h *wire.Request, here bool) {
	if h.Length < uint64(in.io.Direct()) || here {
		in.window = in.full
	} else if h.Command == wire.CmdWrite {
		in.window = smallWindow
	}
}

// receive waits for more bytes. The error is io.EOF if the stream ended between two requests, and
// io.ErrUnexpectedEOF if it ended within one.
func (in *inbox) receive() error {
	now := in.yields.since
	if now == 0 {
		now = in.arrived()
	}
	in.age.receive(now, len(in.received()) > 0)
	in.since.Store(0)
	var n int
	var err error
	if len(in.ahead) > 0 {
		n = in.advance(in.Lend())
	} else {
		n, err = in.io.Recv(in)
		in.rise() // Whatever has ended the wait.
	}
	in.end += n
	if n > 0 {
		now := clock()
		in.yields.end(now)
		in.since.Store(int64(now))
		return nil // An error beside bytes comes again.
	}
	if err == io.EOF && len(in.received()) > 0 {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Lend implements rawio.Lender. What is left of earlier bytes is shorter than a header and a write
// that is not large, so there is always room behind it.
func (in *inbox) Lend() []byte {
	in.rise()
	if in.buf == nil {
		in.buf = in.pool.get(in.full)
		in.start, in.end = 0, copy(in.buf.bytes, in.stub[:in.stubLen])
		in.stubLen = 0
	}
	if in.start > 0 {
		in.end = copy(in.buf.bytes, in.buf.bytes[in.start:in.end])
		in.start = 0
	}
	room := in.buf.bytes[in.end:]
	return room[:min(len(room), in.window)]
}

// Yield implements rawio.Lender. On a single processor it is where a server is found that has
// answered all.
func (in *inbox) Yield(still bool) bool {
	if !in.yields.begin() {
		return false
	}
	if still {
		in.rest()
	}
	return true
}

// Park implements rawio.Lender: it gives the buffer back, unless most of a request lies in it.
func (in *inbox) Park(still bool) {
	in.yields.vain()
	if in.buf != nil && in.end-in.start <= maxStub {
		in.release()
	}
	if still {
		in.rest()
	}
}

// Drained implements rawio.Lender.
func (in *inbox) Drained() { in.age.drained() }

// release gives the buffer back. What is left in it must fit the stub, or be worth nothing any
// more.
func (in *inbox) release() {
	if in.buf == nil {
		return
	}
	in.stubLen = copy(in.stub[:], in.buf.bytes[in.start:in.end])
	in.pool.put(in.buf)
	in.buf = nil
}

// take consumes n bytes, which are there, and returns them. They are valid until the next receive.
func (in *inbox) take(n int) []byte {
	p := in.received()[:n:n]
	in.start += n
	in.age.took = true
	return p
}

// holds reports whether there is room for the payload of a request of that length.
func (in *inbox) holds(length uint64) bool { return length <= uint64(in.full-in.header) }

// gather waits until n bytes are there to be consumed, for which there is room. With an error it
// consumes what has come, and returns it.
func (in *inbox) gather(n int) ([]byte, error) {
	if in.buf == nil || in.start+n > len(in.buf.bytes) {
		in.Lend()
	}
	missing := max(0, in.start+n-in.end)
	m, err := in.fill(in.buf.bytes[in.end:][:missing])
	in.end += m
	if err != nil {
		return in.take(in.end - in.start), err
	}
	return nil, nil
}

// readFull fills p and says how much of it was filled. An error leaves the inbox empty. It is
// io.ErrUnexpectedEOF where the stream ends.
func (in *inbox) readFull(p []byte) (int, error) {
	n := copy(p, in.received())
	in.start += n
	in.age.took = true
	if n == len(p) {
		return n, nil
	}
	m, err := in.fill(p[n:])
	return n + m, err
}

// fill fills p with what has not been received yet.
func (in *inbox) fill(p []byte) (int, error) {
	n := in.advance(p)
	if n == len(p) {
		return n, nil
	}
	m, err := in.io.ReadFull(p[n:], in)
	if in.waiting != 0 {
		in.since.Store(in.before + int64(clock()-in.waiting))
		in.waiting = 0
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n + m, err
}

// advance moves what comes before the rest of the stream to p.
func (in *inbox) advance(p []byte) int {
	n := copy(p, in.ahead)
	if in.ahead = in.ahead[n:]; len(in.ahead) == 0 {
		in.ahead = nil // It may be large.
	}
	return n
}

// Wait implements rawio.Waiter: the client is waited for in the middle of a request.
func (in *inbox) Wait() { in.before, in.waiting = in.since.Swap(0), clock() }

// putBack makes b the first bytes again. Only for an empty inbox.
func (in *inbox) putBack(b []byte) {
	in.ahead = b
	in.age.putBack()
}

// holdsAny reports whether there is anything that was received and not consumed.
func (in *inbox) holdsAny() bool { return len(in.received())+len(in.ahead) > 0 }

// unread returns a copy of all that was received and not consumed.
func (in *inbox) unread() []byte {
	return slices.Concat(in.received(), in.ahead)
}
