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
func (l *loop) open(h *wire.Request, n int, copied bool) error {
	if l.batch != nil && copied && !l.batch.fits(n) {
		if err := l.flush(); err != nil {
			return err
		}
	}
	if l.batch == nil {
		l.batch = batches.Get().(*batch)
		l.batch.canFile = l.inbox.io.SendsPages()
		l.batch.copies = l.export.faulty.Load()
		l.batch.structured, l.batch.extended = l.conn.agreed.Structured, l.conn.agreed.Extended
	}
	l.batch.begin(h, n)
	return nil
}

// succeed answers a request that asked for nothing.
func (l *loop) succeed(h *wire.Request) error {
	if err := l.open(h, 0, false); err != nil {
		return err
	}
	l.batch.commit(h)
	return nil
}

// gather receives the payload of a WRITE into the inbox.
func (l *loop) gather(h *wire.Request) error {
	if err := l.flush(); err != nil {
		return err
	}
	if got, err := l.inbox.gather(int(h.Length)); err != nil {
		l.putBack(h, got)
		return err
	}
	if l.outdated() { // It has waited for its payload.
		return errHungUp
	}
	return nil
}

// readTo has the backend put its data into the batch.
func (l *loop) readTo(h *wire.Request) error {
	// A backend that uses Buffer now and then will do so again: then there must be room before the
	// reply is begun.
	n := int(h.Length)
	if err := l.open(h, n, n <= slabSize); err != nil {
		return err
	}
	return l.settleRead(h, l.callReadTo(h))
}

// read reads into the memory of the batch.
func (l *loop) read(h *wire.Request) error {
	n, p := int(h.Length), &l.export.paces.Read
	if err := l.open(h, n, true); err != nil {
		return err
	}
	b := l.batch.Buffer(n)
	l.meter.Begin(p)
	err := l.callReadAt(b, h)
	l.meter.End(p, n)
	return l.settleRead(h, err)
}

// writeFrom has the backend take the payload from where it is, if nobody else is at work on the
// range. A lock is for what has to wait for the client.
func (l *loop) writeFrom(h *wire.Request) error {
	e, n := l.export, int(h.Length)
	arrived := len(l.inbox.received()) >= n
	switch {
	case arrived:
		if !e.locks.Free(l.conn.owner, rangeOf(h)) {
			return l.execute(h)
		}
	default:
		if err := l.flush(); err != nil {
			return err
		}
		if !e.locks.TryAdd(&l.lock, l.conn.owner, rangeOf(h)) {
			return l.execute(h)
		}
	}
	l.payload = payload{inbox: &l.inbox, total: n, left: n, arrived: arrived}
	return l.settleWrite(h, l.callWriteFrom(h))
}

// write writes from the inbox, if nobody else is at work on the range.
func (l *loop) write(h *wire.Request) error {
	if !l.export.locks.TryAdd(&l.lock, l.conn.owner, rangeOf(h)) {
		return l.execute(h)
	}
	n, p := int(h.Length), &l.export.paces.Write
	b := l.inbox.take(n)
	l.payload = payload{total: n}
	l.meter.Begin(p)
	err := l.callWriteAt(b, h)
	l.meter.End(p, n)
	return l.settleWrite(h, err)
}

// The calls of the backend on the goroutine of the loop. A panic is the failure of one request.
// l.inside is left set by a call that ends the goroutine, and by no other.

func (l *loop) callReadTo(h *wire.Request) (err error) {
	defer l.recovered(&err)
	l.inside = true
	err = l.export.dev.ReadTo.ReadAtTo(l.batch, int64(h.Offset), int(h.Length))
	l.inside = false
	return err
}

func (l *loop) callReadAt(p []byte, h *wire.Request) (err error) {
	defer l.recovered(&err)
	l.inside = true
	n, err := l.export.readAt(l.conn.ctx, p, int64(h.Offset))
	l.inside = false
	return whole(n, len(p), err, io.ErrUnexpectedEOF)
}

func (l *loop) callWriteFrom(h *wire.Request) (err error) {
	defer l.recovered(&err)
	l.inside = true
	err = l.export.dev.WriteFrom.WriteAtFrom(&l.payload, int64(h.Offset), int(h.Length))
	l.inside = false
	return err
}

func (l *loop) callWriteAt(p []byte, h *wire.Request) (err error) {
	defer l.recovered(&err)
	l.inside = true
	n, err := l.export.writeAt(l.conn.ctx, p, int64(h.Offset))
	l.inside = false
	return whole(n, len(p), err, io.ErrShortWrite)
}

// recovered is to be deferred.
func (l *loop) recovered(err *error) {
	if p := recover(); p != nil {
		l.inside = false
		*err = &panicError{value: p, stack: debug.Stack()}
	}
}

// settle draws the consequences of a call that ended the goroutine of the loop.
func (l *loop) settle(h *wire.Request, err error) error {
	if h.Command == wire.CmdRead {
		return l.settleRead(h, err)
	}
	return l.settleWrite(h, err)
}

// settleWrite draws the consequences of a write: err is its outcome. What it returns is an error of
// the connection.
func (l *loop) settleWrite(h *wire.Request, err error) error {
	l.export.locks.Remove(&l.lock)
	p := &l.payload
	switch {
	case p.err != nil:
		return l.breakOff(h)
	case err == nil && p.left == 0:
		return l.succeed(h)
	case err == backends.ErrWouldBlock && p.left == p.total:
		return l.execute(h)
	case err == nil:
		err = fmt.Errorf("the backend has left %d of %d bytes: %w", p.left, p.total, io.ErrShortWrite)
	}
	if p.drain(&payloads) != nil {
		return l.breakOff(h)
	}
	p.kept = nil
	l.handOver(h, err)
	return nil
}

// settleRead is settleWrite of a read.
func (l *loop) settleRead(h *wire.Request, err error) error {
	if l.batch.open.blocked {
		err = backends.ErrWouldBlock
	}
	if err == nil && !l.batch.complete() {
		err = fmt.Errorf("the backend has given %d of %d bytes: %w",
			l.batch.open.got, l.batch.open.want, io.ErrUnexpectedEOF)
	}
	if err == nil {
		l.batch.commit(h)
		return nil
	}
	l.batch.rewind()
	if err == backends.ErrWouldBlock {
		return l.execute(h)
	}
	l.handOver(h, err)
	return nil
}

// breakOff makes a write, whose payload will not all come, the beginning of what is unread. Its
// error is why.
func (l *loop) breakOff(h *wire.Request) error {
	l.putBack(h, l.payload.kept)
	l.payload.kept = nil
	return l.payload.err
}
