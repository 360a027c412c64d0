package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/admit"
	"github.com/nbdctl/nbdctl/server/internal/pace"
	"github.com/nbdctl/nbdctl/server/internal/rangelock"
	"github.com/nbdctl/nbdctl/server/internal/rawio"
	"github.com/nbdctl/nbdctl/server/metrics"
	"github.com/nbdctl/nbdctl/server/wire"
)

// ErrShutdown is what Transmit returns after Shutdown.
var ErrShutdown = errors.New("server: connection shut down")

// A Conn serves one client, connected by a stream socket, from the transmission phase on. Its
// methods are safe for concurrent use.
type Conn struct {
	export   *Export
	nc       net.Conn
	socket   net.Conn  // that nc stands on
	agreed   Agreement // the zero value: nothing but how the Linux client speaks
	control  control
	outbox   outbox
	limit    *admit.Connection
	owner    *rangelock.Owner
	account  *admit.Account // nil: the limit of the connection is the only one
	flight   flight
	counters metrics.Counters

	loop loop

	disconnected atomic.Bool // the client said goodbye
	closed       atomic.Bool
	broken       atomic.Bool // nothing can be sent any more
	left         atomic.Bool // the client has hung up

	// ctx is that of the backend's calls. It ends when nobody waits for them any more.
	ctx    context.Context
	cancel context.CancelFunc

	mu     sync.Mutex // guards the three below
	unread []byte
	halted bool // stopped is closed
	// away is for how long the loop did not see that the client had hung up, when it was sealed. It
	// is set before stopped is closed.
	away time.Duration

	looped  chan struct{} // closed when the loop has ended
	stopped chan struct{} // closed then, or when it will not begin anything more
	ended   chan struct{} // closed when nothing is in flight and nothing will be read or written any more
	retired func()        // called once, after that; nil: nobody wants to know
}

// NewConn prepares to serve nc, whose handshake is over (the Linux kernel's client knows none).
// unread holds bytes that somebody received from nc before, and belongs to the Conn from now on.
// The caller keeps nc, which Close closes.
func (e *Export) NewConn(nc net.Conn, unread []byte) *Conn { return e.newConn(nc, unread, nil, nil) }

// newConn is NewConn for a connection whose memory for payloads is within m, too, unless that is
// nil. stalled is called if the client keeps it from others for too long.
func (e *Export) newConn(nc net.Conn, unread []byte, m *admit.Memory, stalled func(*Conn)) *Conn {
	raw := rawio.New(nc)
	c := &Conn{
		export:  e,
		nc:      nc,
		socket:  socketOf(nc),
		control: control{nc: nc},
		outbox:  outbox{io: raw},
		limit:   admit.NewConnection(e.maxInFlight, maxInFlightBytes),
		unread:  unread,
		looped:  make(chan struct{}),
		stopped: make(chan struct{}),
		ended:   make(chan struct{}),
	}
	c.loop = loop{
		conn:   c,
		export: e,
		inbox: inbox{
			io: raw, pool: &payloads, ahead: unread, full: raw.Window(), window: raw.Window(), header: wire.RequestSize,
		},
		meter:  pace.Meter{Set: &e.paces, Switches: pace.ThreadSwitches},
		result: make(chan error, 1),
	}
	if len(unread) > 0 {
		e.several.Store(true) // The client may have sent it again while somebody else had it.
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.owner = rangelock.NewOwner(c.abandoned, c.control.giveUp)
	if m != nil {
		c.account = m.Open(func() { stalled(c) })
	}
	c.outbox.broken = func() {
		c.broken.Store(true)
		_ = c.stop() // Where that fails, the loop does, too.
	}
	return c
}

// agree sets what was negotiated, before Transmit.
func (c *Conn) agree(a Agreement) {
	c.agreed = a
	if a.Extended {
		c.loop.inbox.header = wire.ExtendedRequestSize
	}
}

// Transmit serves requests until the client disconnects, and returns when the last of them is
// answered. One goroutine receives requests, executes at once what does not make it wait, and hands
// the rest to workers, within the export's bounds: a slow request holds up nobody until the bound
// is reached. To be called once.
//
// It returns nil if the client sent NBD_CMD_DISC, or closed the connection between two requests and
// got all its replies; ErrShutdown after Shutdown; an error that Is net.ErrClosed after Close; else
// what went wrong with the connection. A request that fails is answered and is no reason to return.
// The socket stays open in all cases.
func (c *Conn) Transmit() error {
	if err := c.export.enlist(c); err != nil {
		return err
	}
	defer c.export.retire(c)

	go c.loop.run()
	unwatch := c.watch()
	err := <-c.loop.result
	close(c.looped)
	c.leave()
	if broken := c.broken.Load(); !c.Away() && (broken || c.abandoned()) {
		c.lose(c.loop.inbox.holdsAny() || err != io.EOF && !(broken && err == ErrShutdown))
	}
	c.halt(0)
	c.limit.Drained(nil)
	unwatch()
	err = c.verdict(err)
	c.end()
	return err
}

// verdict turns the reader's reason to stop into what Transmit returns, now that nothing is in
// flight.
func (c *Conn) verdict(err error) error {
	broken := c.outbox.failure()
	switch {
	case err == nil:
		return nil // After NBD_CMD_DISC the client waits for no reply.
	case c.closed.Load():
		return fmt.Errorf("server: %w", net.ErrClosed)
	case broken != nil:
		return fmt.Errorf("server: %w", broken)
	case err == io.EOF:
		return nil
	case err == ErrShutdown, c.control.stopping.Load() && errors.Is(err, os.ErrDeadlineExceeded):
		return ErrShutdown
	default:
		return fmt.Errorf("server: receive request: %w", err)
	}
}

func (c *Conn) begin() error {
	err := c.control.begin()
	if err != nil && c.closed.Load() {
		return fmt.Errorf("server: %w", net.ErrClosed)
	}
	return err
}

// end is called when nothing is in flight any more.
func (c *Conn) end() {
	c.mu.Lock()
	c.unread = c.loop.inbox.unread()
	c.loop.inbox.release()
	c.control.end()
	c.mu.Unlock()
	c.retire()
}

// retire tells that the connection is over, or never begins.
func (c *Conn) retire() {
	c.cancel()
	close(c.ended)
	if c.retired != nil {
		c.retired()
	}
}

// stop has Transmit return when what was begun is answered, or never begin.
func (c *Conn) stop() error {
	if c.control.preclude() {
		c.retire()
		return nil
	}
	return c.control.stop()
}

// Shutdown stops reading, waits until every request that was read is answered, and leaves the
// socket open, so that somebody else can go on with it and with what Unread returns. If ctx ends
// first, its error is returned and the rest goes on by itself. The read deadline of the connection
// is used for it, and cleared afterwards.
func (c *Conn) Shutdown(ctx context.Context) error {
	if err := c.stop(); err != nil {
		return fmt.Errorf("server: shut down connection: %w", err)
	}
	select {
	case <-c.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("server: shut down connection: %w", ctx.Err())
	}
}

// Unread returns the bytes that were received and not executed: complete requests, the beginning of
// one, or both. It is valid once Shutdown has returned nil, or Transmit has returned; before that
// it is nil.
func (c *Conn) Unread() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.control.serving() {
		return nil
	}
	return c.unread
}

// Close cuts the connection, and ends the context of the backend calls in flight. Transmit returns
// once these have, which may take long where the backend knows no context. Close does not wait for
// that. Further calls do nothing.
func (c *Conn) Close() error {
	if c.closed.Load() {
		return nil
	}
	c.lose(false)
	if c.closed.Swap(true) {
		return nil
	}
	if c.control.preclude() {
		defer c.retire()
	}
	if c.account != nil {
		c.account.Close() // first: to close the socket may wait for a disk that it is sending from
	}
	defer c.export.admission.wake()
	defer c.export.locks.Wake()
	c.cancel()
	return c.socket.Close()
}

// Disconnected reports whether the client has ended the connection in order, by NBD_CMD_DISC.
func (c *Conn) Disconnected() bool { return c.disconnected.Load() }

// Stopped returns a channel that is closed when Transmit begins no request any more, because the
// connection has ended in whatever way. It returns after that, when the backend has let go of the
// last request. Meanwhile the client may go on over another connection of the export: what it sends
// again waits for its turn (see the package documentation).
func (c *Conn) Stopped() <-chan struct{} { return c.stopped }

// Away reports whether the connection was stopped because the client had hung up, while something
// kept it from looking. When Transmit returns it may have found that the client had disconnected in
// order before. It is valid when Stopped has been closed.
func (c *Conn) Away() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.away > 0
}

// Absence returns for how long the requests that were received last kept the connection from
// looking whether the client is there, because they waited for the backend other than on workers.
// It is valid when Stopped has been closed.
func (c *Conn) Absence() time.Duration {
	if c.away > 0 {
		return c.away
	}
	return c.loop.absence
}

// Stats returns what the connection has served so far.
func (c *Conn) Stats() Stats {
	s := c.counters.Snapshot()
	s.InFlight, s.Oldest = c.inFlight()
	return s
}
