package server

import (
	"fmt"
	"io"
	"runtime/debug"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

// The calls of the backend on the goroutine of the loop. A panic is the failure of one request.
// c.inside is left set by a call that ends the goroutine, and by no other.

func (c *Conn) readTo(h *wire.Request) (err error) {
	defer c.recovered(&err)
	c.inside = true
	err = c.export.dev.ReadTo.ReadAtTo(c.batch, int64(h.Offset), int(h.Length))
	c.inside = false
	return err
}

// lockFast reports whether a backend that says whether it would block may be asked, because nobody
// else is at work on the range. A lock is for what has to wait for the client.
func (c *Conn) lockFast(h *wire.Request, arrived bool) bool {
	if arrived {
		return c.export.locks.Free(c.owner, rangeOf(h))
	}
	return c.export.locks.TryAdd(&c.lock, c.owner, rangeOf(h))
}

func (c *Conn) readAt(p []byte, h *wire.Request) (err error) {
	defer c.recovered(&err)
	c.inside = true
	n, err := c.export.readAt(c.ctx, p, int64(h.Offset))
	c.inside = false
	return whole(n, len(p), err, io.ErrUnexpectedEOF)
}

func (c *Conn) writeFrom(h *wire.Request) (err error) {
	defer c.recovered(&err)
	c.inside = true
	err = c.export.dev.WriteFrom.WriteAtFrom(&c.payload, int64(h.Offset), int(h.Length))
	c.inside = false
	return err
}

func (c *Conn) writeAt(p []byte, h *wire.Request) (err error) {
	defer c.recovered(&err)
	c.inside = true
	n, err := c.export.writeAt(c.ctx, p, int64(h.Offset))
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

// settle draws the consequences of such a call: err is its outcome. What settle returns is an error
// of the connection.
func (c *Conn) settle(h *wire.Request, err error) error {
	if h.Command == wire.CmdRead {
		return c.settleRead(h, err)
	}
	c.export.locks.Remove(&c.lock)
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
	if p.drain(&payloads) != nil {
		return c.breakOff(h)
	}
	p.kept = nil
	c.handOver(h, err)
	return nil
}

func (c *Conn) settleRead(h *wire.Request, err error) error {
	if c.batch.open.blocked {
		err = backends.ErrWouldBlock
	}
	if err == nil && !c.batch.complete() {
		err = fmt.Errorf("the backend has given %d of %d bytes: %w", c.batch.open.got, c.batch.open.want, io.ErrUnexpectedEOF)
	}
	if err == nil {
		c.batch.commit(h)
		return nil
	}
	c.batch.rewind()
	if err == backends.ErrWouldBlock {
		return c.execute(h)
	}
	c.handOver(h, err)
	return nil
}

// breakOff makes a write, whose payload will not all come, the beginning of what is unread. Its
// error is why.
func (c *Conn) breakOff(h *wire.Request) error {
	c.inbox.putBack(append(h.Append(nil), c.payload.kept...))
	c.payload.kept = nil
	return c.payload.err
}
