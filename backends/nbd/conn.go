package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/server/wire"
)

const (
	// cookieShift leaves room for the index of a call in a cookie.
	cookieShift = 16
	// maxMaxInFlight is how many calls that is.
	maxMaxInFlight = 1 << cookieShift
	// sendBuffer, in bytes, is what a Unix socket takes before it makes the sender wait for the
	// server. The system may allow less of it. Its default is shorter than one WRITE of 256 KiB.
	sendBuffer = 1 << 20
	// retirement is how long requests may take that are in flight when the server says that it is
	// shutting down.
	retirement = 5 * time.Second
	// farewell is how long the server may take to accept NBD_CMD_DISC.
	farewell = time.Second
)

// A conn is a session in which requests are made. Its methods are safe for concurrent use.
type conn struct {
	Session
	raw    net.Conn   // below TLS, which would say goodbye when it is closed
	copies bool       // the transport sends one piece of memory best
	calls  []call     // all that there are
	free   chan *call // those that are not in use

	inFlight atomic.Int64
	heard    atomic.Int64 // how often something was received, or sent
	answered atomic.Bool  // a request was
	retired  atomic.Bool  // no more requests are to be made
	missing  bool         // it has never been there; does not change

	sending sync.Mutex    // guards those below
	busy    bool          // somebody sends
	next    *batch        // what is to be sent
	spare   *batch        // empty; nil: it is being sent
	rested  chan struct{} // closed when busy ends; nil: nobody waits for that
	leaving bool          // the goodbye is being said
	parking *parking      // the receiver is not to read; nil: it is
	handed  bool          // copies of the socket are another process's, or may be; who did it is busy
	err     error         // why the connection has ended

	help    chan struct{} // has a value when the helper is to send
	dead    chan struct{} // closed when err is set
	running sync.WaitGroup
}

// newConn makes requests in s.
func newConn(s *Session, o *Options) *conn {
	k := makeConn(s, o)
	k.running.Add(2)
	go k.helper()
	go k.receive()
	if o.Timeout > 0 {
		k.running.Add(1)
		go k.watch(o.Timeout)
	}
	return k
}

// missingConn is one that is lost from the start.
func missingConn(a Agreement, o *Options) *conn {
	k := makeConn(&Session{Agreement: a}, o)
	k.missing, k.err = true, &connError{errMissing}
	close(k.dead)
	return k
}

// errMissing is why a connection is lost that was not handed over.
var errMissing = errors.New("it did not come along from the process before")

// makeConn makes a conn that does nothing by itself.
func makeConn(s *Session, o *Options) *conn {
	k := &conn{
		Session: *s,
		calls:   make([]call, o.MaxInFlight), free: make(chan *call, o.MaxInFlight),
		next: new(batch), spare: new(batch),
		help: make(chan struct{}, 1), dead: make(chan struct{}),
	}
	k.raw = s.NetConn
	if secure, ok := s.NetConn.(*tls.Conn); ok {
		k.raw, k.copies = secure.NetConn(), true
	}
	if u, ok := k.raw.(*net.UnixConn); ok { // TCP adapts its buffer to the path, unless it is told a size.
		_ = u.SetWriteBuffer(sendBuffer) // A socket that stays as it is works, too.
	}
	pieces := make([]extent, len(k.calls))
	for i := range k.calls {
		c := &k.calls[i]
		c.index, c.done, c.filled.L = uint64(i), make(chan struct{}, 1), &c.mu
		c.covered.pieces = pieces[i : i : i+1] // What comes in order is one.
		k.free <- c
	}
	return k
}

// A connError is why a connection has ended: what happened to the requests on it is not known.
type connError struct{ err error }

func (e *connError) Error() string { return "nbd: connection lost: " + e.err.Error() }
func (e *connError) Unwrap() error { return e.err }

// fail ends the connection, unless it has ended already.
func (k *conn) fail(err error) {
	k.sending.Lock()
	if k.err != nil {
		k.sending.Unlock()
		return
	}
	switch {
	case k.retired.Load():
		err = errRetired
	case k.leaving: // Whatever the server makes of the goodbye.
		err = net.ErrClosed
	}
	k.err = &connError{err}
	close(k.dead)
	gently := k.leaving || k.handed // The option is one of all copies of the socket.
	k.sending.Unlock()
	if l, ok := k.raw.(interface{ SetLinger(int) error }); ok && !gently {
		// What the system has still to send is thrown away, and the server is told so (RST): it
		// must not execute on an old connection what is sent again on a new one.
		l.SetLinger(0)
	}
	k.raw.Close()
}

// retire has no more requests made on the connection. It ends in order when those in flight have
// been answered, or after a while.
func (k *conn) retire() {
	if k.retired.Swap(true) {
		return
	}
	time.AfterFunc(retirement, func() { k.fail(errRetired) })
	if k.inFlight.Load() == 0 {
		go k.close()
	}
}

// errRetired is how a connection ends whose server has said that it is shutting down.
var errRetired = errors.New("the server is shutting down")

// watch ends the connection when requests are in flight and nothing was received for that long.
func (k *conn) watch(timeout time.Duration) {
	defer k.running.Done()
	const looks = 16
	tick := time.NewTicker(max(timeout/looks, 1))
	defer tick.Stop()
	var heard int64
	for silent := 0; ; {
		select {
		case <-tick.C:
		case <-k.dead:
			return
		}
		if now := k.heard.Load(); now != heard || k.inFlight.Load() == 0 || k.away() {
			heard, silent = now, 0
		} else if silent++; silent > looks {
			k.fail(fmt.Errorf("the server has said nothing for %v", timeout))
		}
	}
}

// alive reports whether requests can be made.
func (k *conn) alive() bool {
	if k.retired.Load() {
		return false
	}
	select {
	case <-k.dead:
		return false
	default:
		return true
	}
}

// ended returns why the connection has ended.
func (k *conn) ended() error {
	k.sending.Lock()
	defer k.sending.Unlock()
	return k.err
}

// A request is what do makes.
type request struct {
	command wire.Command
	flags   wire.CommandFlags
	off, n  int64
	data    []byte  // of a READ or WRITE, n bytes
	status  *status // of a BLOCK_STATUS
}

// do makes a request and waits for its reply. It waits, too, while as many as possible are in
// flight. A request other than WRITE can be given up with ctx; its data are not used any more then.
func (k *conn) do(ctx context.Context, r *request) error {
	ended := ctx.Done() // nil of one that does not end
	var c *call
	select {
	case c = <-k.free:
	case <-ended:
		return context.Cause(ctx)
	}
	c.request = wire.Request{Flags: r.flags, Command: r.command, Offset: uint64(r.off), Length: uint64(r.n)}
	if k.Extended && r.command == wire.CmdWrite {
		c.request.Flags |= wire.CmdFlagPayloadLen // "Request types", NBD_CMD_WRITE
	}
	c.data, c.status, c.failure, c.err = r.data, r.status, nil, nil
	c.covered.reset()
	if c.status != nil {
		c.status.extents, c.status.came = c.status.extents[:0], c.status.came[:0]
	}
	k.inFlight.Add(1)
	c.patient = ended == nil || r.command == wire.CmdWrite
	k.start(c)
	if c.patient {
		<-c.done
	} else {
		select {
		case <-c.done:
		case <-ended:
			return k.giveUp(ctx, c)
		}
	}
	err := c.err
	if c.failure != nil {
		err = c.failure
	}
	k.put(c)
	return err
}

// giveUp leaves a call to the reader, which puts it back when the reply comes.
func (k *conn) giveUp(ctx context.Context, c *call) error {
	c.abandon(func() { k.NetConn.SetReadDeadline(longAgo) })
	go func() { // Seldom, and over with the connection at the latest.
		<-c.done
		c.gone = false
		k.put(c)
	}()
	return context.Cause(ctx)
}

// put makes a call free again.
func (k *conn) put(c *call) {
	c.data, c.status = nil, nil
	last := k.inFlight.Add(-1) == 0
	k.free <- c
	if last && k.retired.Load() {
		go k.close()
	}
}

// close takes leave of the server if no request is in flight, and ends the connection. One that was
// handed over ends here without a word.
func (k *conn) close() error {
	k.sending.Lock()
	quiet := k.err == nil && !k.busy && k.inFlight.Load() == 0
	k.busy, k.leaving = k.busy || quiet, k.leaving || quiet
	ours := quiet || k.handed
	k.sending.Unlock()
	if quiet {
		bye := wire.Request{Command: wire.CmdDisconnect}
		message := bye.Append(nil)
		if k.Extended {
			message = bye.AppendExtended(nil)
		}
		// A deadline would not do: TLS has one of its own for its goodbye.
		late := time.AfterFunc(farewell, func() { k.fail(net.ErrClosed) })
		k.NetConn.Write(message)
		if secure, ok := k.NetConn.(*tls.Conn); ok {
			secure.CloseWrite() // as the server has it that its peer has not been cut off
		}
		late.Stop()
	}
	k.fail(net.ErrClosed)
	if ours { // Nobody else is going to send.
		k.sending.Lock()
		k.drop()
		k.sending.Unlock()
	}
	k.running.Wait()
	var lost *connError
	if errors.As(k.err, &lost) && !errors.Is(lost.err, net.ErrClosed) && lost.err != errRetired {
		return fmt.Errorf("nbd: the connection was lost before: %w", lost.err)
	}
	return nil
}
