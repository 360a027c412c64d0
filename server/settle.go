package server

import (
	"fmt"
	"io"
	"runtime/debug"

	"github.com/nbdctl/nbdctl/backends"
)

// The calls below are those of the backend on the goroutine of the loop. c.inside is left set by a call that ends the goroutine.

func (c *Conn) readTo(h header) (err error) {
	defer c.recovered(&err)
	c.current, c.inside = h, true
	err = c.export.dev.ReadTo.ReadAtTo(c.batch, int64(h.offset), int(h.length))
	c.inside = false
	return err
}

func (c *Conn) readAt(p []byte, h header) (err error) {
	defer c.recovered(&err)
	c.current, c.inside = h, true
	n, err := c.export.dev.ReadAt(p, int64(h.offset))
	c.inside = false
	return whole(n, len(p), err, io.ErrUnexpectedEOF)
}

func (c *Conn) writeFrom(h header) (err error) {
	defer c.recovered(&err)
	c.current, c.inside = h, true
	err = c.export.dev.WriteFrom.WriteAtFrom(&c.payload, int64(h.offset), int(h.length))
	c.inside = false
	return err
}

func (c *Conn) writeAt(p []byte, h header) (err error) {
	defer c.recovered(&err)
	c.current, c.inside = h, true
	n, err := c.export.dev.WriterAt.WriteAt(p, int64(h.offset))
	c.inside = false
	return whole(n, len(p), err, io.ErrShortWrite)
}

// recovered is to be deferred.
func (c *Conn) recovered(err *error) {
	if p := recover(); p != nil {
		c.inside = false
		*err = &panicError{value: p, stack: debug.Stack()}
	}
}

// settle draws the consequences of such a call: err is its outcome. What settle returns is an error of the connection.
func (c *Conn) settle(h header, err error) error {
	if h.op == OpRead {
		c.settleRead(h, err)
		return nil
	}
	p := &c.payload
	switch {
	case p.err != nil:
		return c.breakOff(h)
	case err == nil && p.left == 0:
		return c.succeed(h)
	case err == backends.ErrWouldBlock && p.left == p.total:
		return c.receiveWrite(h, nil)
	case err == nil:
		err = fmt.Errorf("the backend has left %d of %d bytes: %w", p.left, p.total, io.ErrShortWrite)
	}
	if p.drain(&c.export.buffers) != nil {
		return c.breakOff(h)
	}
	p.kept = nil
	c.handOver(h, err)
	return nil
}

func (c *Conn) settleRead(h header, err error) {
	if err == nil && !c.batch.complete() {
		err = fmt.Errorf("the backend has given %d of %d bytes: %w", c.batch.open.got, c.batch.open.want, io.ErrUnexpectedEOF)
	}
	if err == nil {
		c.batch.commit(h)
		return
	}
	c.batch.rewind()
	if err == backends.ErrWouldBlock {
		c.execute(h)
	} else {
		c.handOver(h, err)
	}
}

// breakOff makes a write, whose payload will not all come, the beginning of what is unread. Its error is why.
func (c *Conn) breakOff(h header) error {
	c.inbox.putBack(append(h.appendTo(nil), c.payload.kept...))
	c.payload.kept = nil
	return c.payload.err
}

// receiveWrite receives the payload of a WRITE into memory of its own and has the request executed. A write that is refused is
// received like any other: its bytes must leave the stream, and until they all have, the request can still be handed over as
// unread.
func (c *Conn) receiveWrite(h header, refused *refusal) error {
	if h.length == 0 {
		c.handOver(h, refused)
		return nil
	}
	c.enter(cost(h))
	b := c.export.buffers.get(int(h.length))
	if n, err := c.inbox.readFull(b.bytes); err != nil {
		c.inbox.putBack(append(h.appendTo(nil), b.bytes[:n]...))
		c.export.buffers.put(b)
		c.gate.leave(cost(h))
		return err
	}
	if refused != nil {
		r := c.request(h)
		r.payload, r.err = b, refused
		go r.run()
		return nil
	}
	c.start(h, b)
	return nil
}

// execute has a request without payload executed.
func (c *Conn) execute(h header) {
	c.enter(cost(h))
	c.start(h, nil)
}

// start has a request executed that is inside the gate: by a worker, or by the loop where that pays.
func (c *Conn) start(h header, payload *buffer) {
	r := c.request(h)
	r.payload = payload
	if pace := c.export.pace(h); pace != nil && h.length <= maxAlone && pace.alone.Load() {
		c.meter.settle()
		r.alone = true
		r.run()
		return
	}
	go r.run()
}

// handOver has a request answered that failed or was refused. A worker does it, since logs may be slow.
func (c *Conn) handOver(h header, err error) {
	c.enter(cost(h))
	r := c.request(h)
	r.err = err
	go r.run()
}

// request makes a request that is inside the gate.
func (c *Conn) request(h header) *request {
	r := c.export.requests.Get().(*request)
	r.conn, r.header, r.cost = c, h, cost(h)
	return r
}

// enter passes the gate. Before it waits there, the replies so far are sent; if that fails, the outbox knows.
func (c *Conn) enter(cost int64) {
	if !c.gate.tryEnter(cost) {
		_ = c.flush()
		c.gate.enter(cost)
	}
}
