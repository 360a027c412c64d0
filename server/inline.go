package server

import (
	"fmt"
	"io"
	"runtime/debug"

	"github.com/nbdctl/nbdctl/backends"
	"github.com/nbdctl/nbdctl/server/wire"
)

// The executors of plans that need no goroutine but that of the loop.

// open opens a reply in the batch, with n bytes of data. copied says that they will be in the
// batch's own memory.
func (c *Conn) open(h *wire.Request, n int, copied bool) error {
	if c.batch != nil && copied && !c.batch.fits(n) {
		if err := c.flush(); err != nil {
			return err
		}
	}
	if c.batch == nil {
		c.batch = batches.Get().(*batch)
		c.batch.canFile = c.inbox.io.SendsPages()
		c.batch.copies = c.export.faulty.Load()
	}
	c.batch.begin(h.Cookie, n)
	return nil
}

// succeed answers a request that asked for nothing.
func (c *Conn) succeed(h *wire.Request) error {
	if err := c.open(h, 0, false); err != nil {
		return err
	}
	c.batch.commit(h)
	return nil
}

// gather receives the payload of a WRITE into the inbox.
func (c *Conn) gather(h *wire.Request) error {
	if err := c.flush(); err != nil {
		return err
	}
	if got, err := c.inbox.gather(int(h.Length)); err != nil {
		c.inbox.putBack(append(h.Append(nil), got...))
		return err
	}
	if c.outdated() { // It has waited for its payload.
		return errHungUp
	}
	return nil
}

// readTo has the backend put its data into the batch.
func (c *Conn) readTo(h *wire.Request) error {
	// A backend that uses Buffer now and then will do so again: then there must be room before the
	// reply is begun.
	n := int(h.Length)
	if err := c.open(h, n, n <= slabSize); err != nil {
		return err
	}
	return c.settleRead(h, c.callReadTo(h))
}

// read reads into the memory of the batch.
func (c *Conn) read(h *wire.Request) error {
	n, p := int(h.Length), &c.export.paces.Read
	if err := c.open(h, n, true); err != nil {
		return err
	}
	b := c.batch.Buffer(n)
	c.meter.Begin(p)
	err := c.callReadAt(b, h)
	c.meter.End(p, n)
	return c.settleRead(h, err)
}

// writeFrom has the backend take the payload from where it is, if nobody else is at work on the
// range. A lock is for what has to wait for the client.
func (c *Conn) writeFrom(h *wire.Request) error {
	e, n := c.export, int(h.Length)
	arrived := len(c.inbox.received()) >= n
	switch {
	case arrived:
		if !e.locks.Free(c.owner, rangeOf(h)) {
			return c.execute(h)
		}
	default:
		if err := c.flush(); err != nil {
			return err
		}
		if !e.locks.TryAdd(&c.lock, c.owner, rangeOf(h)) {
			return c.execute(h)
		}
	}
	c.payload = payload{inbox: &c.inbox, total: n, left: n, arrived: arrived}
	return c.settleWrite(h, c.callWriteFrom(h))
}

// write writes from the inbox, if nobody else is at work on the range.
func (c *Conn) write(h *wire.Request) error {
	if !c.export.locks.TryAdd(&c.lock, c.owner, rangeOf(h)) {
		return c.execute(h)
	}
	n, p := int(h.Length), &c.export.paces.Write
	b := c.inbox.take(n)
	c.payload = payload{total: n}
	c.meter.Begin(p)
	err := c.callWriteAt(b, h)
	c.meter.End(p, n)
	return c.settleWrite(h, err)
}

// The calls of the backend on the goroutine of the loop. A panic is the failure of one request.
// c.inside is left set by a call that ends the goroutine, and by no other.

func (c *Conn) callReadTo(h *wire.Request) (err error) {
	defer c.recovered(&err)
	c.inside = true
	err = c.export.dev.ReadTo.ReadAtTo(c.batch, int64(h.Offset), int(h.Length))
	c.inside = false
	return err
}

func (c *Conn) callReadAt(p []byte, h *wire.Request) (err error) {
	defer c.recovered(&err)
	c.inside = true
	n, err := c.export.readAt(c.ctx, p, int64(h.Offset))
	c.inside = false
	return whole(n, len(p), err, io.ErrUnexpectedEOF)
}

func (c *Conn) callWriteFrom(h *wire.Request) (err error) {
	defer c.recovered(&err)
	c.inside = true
	err = c.export.dev.WriteFrom.WriteAtFrom(&c.payload, int64(h.Offset), int(h.Length))
	c.inside = false
	return err
}

func (c *Conn) callWriteAt(p []byte, h *wire.Request) (err error) {
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

// settle draws the consequences of a call that ended the goroutine of the loop.
func (c *Conn) settle(h *wire.Request, err error) error {
	if h.Command == wire.CmdRead {
		return c.settleRead(h, err)
	}
	return c.settleWrite(h, err)
}

// settleWrite draws the consequences of a write: err is its outcome. What it returns is an error of
// the connection.
func (c *Conn) settleWrite(h *wire.Request, err error) error {
	c.export.locks.Remove(&c.lock)
	p := &c.payload
	switch {
	case p.err != nil:
		return c.breakOff(h)
	case err == nil && p.left == 0:
		return c.succeed(h)
	case err == backends.ErrWouldBlock && p.left == p.total:
		return c.execute(h)
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

// settleRead is settleWrite of a read.
func (c *Conn) settleRead(h *wire.Request, err error) error {
	if c.batch.open.blocked {
		err = backends.ErrWouldBlock
	}
	if err == nil && !c.batch.complete() {
		err = fmt.Errorf("the backend has given %d of %d bytes: %w",
			c.batch.open.got, c.batch.open.want, io.ErrUnexpectedEOF)
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
