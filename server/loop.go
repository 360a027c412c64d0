package server

import (
	"fmt"
	"runtime/debug"

	"github.com/nbdctl/nbdctl/server/wire"
)

// run is the goroutine of the loop. It goes on in another one if the backend ends this one
// (runtime.Goexit).
func (c *Conn) run() {
	debug.SetPanicOnFault(true) // A fault in the backend's memory is the failure of one request, as recovered has it.
	finished := false
	defer func() {
		if !finished {
			go c.run()
		}
	}()
	err := c.recall()
	if err == nil {
		err = c.serve()
	}
	for c.pass(err) {
		err = c.serve()
	}
	if flush := c.flush(); err == nil {
		err = flush
	}
	c.inbox.since.Store(0)
	finished = true
	c.result <- err
}

// recall settles the request in which the backend has ended the goroutine of the loop.
func (c *Conn) recall() error {
	if !c.inside {
		return nil
	}
	c.inside = false
	return c.settle(&c.current, errNoReturn)
}

// serve is the loop. Each round takes one request from what was received. It returns the reason to
// stop: nil for NBD_CMD_DISC.
func (c *Conn) serve() error {
	for !c.stopping.Load() {
		if err := c.next(); err != nil {
			return err
		}
		if c.current.Command == wire.CmdDisconnect {
			c.disconnected.Store(true)
			return nil
		}
		if err := c.dispatch(&c.current); err != nil {
			return err
		}
		if c.batch != nil && c.batch.full() {
			if err := c.flush(); err != nil {
				return err
			}
		}
	}
	return ErrShutdown
}

// next takes the header of the next request, once its payload is there too if it has a small one.
// When nothing whole is left, the replies so far are sent and more is received, which is where an
// idle connection waits. So a burst of requests is received by one system call and answered by
// another, and nobody ever waits for more requests to come.
func (c *Conn) next() error {
	for {
		b := c.inbox.received()
		if len(b) >= wire.RequestSize {
			h := &c.current
			if err := h.Decode((*[wire.RequestSize]byte)(b)); err != nil {
				return err
			}
			c.inbox.expect(h, c.gathers(h))
			if h.Command != wire.CmdWrite || h.Length >= largeWrite || len(b)-wire.RequestSize >= int(h.Length) {
				c.inbox.take(wire.RequestSize)
				return nil
			}
		}
		if err := c.wait(); err != nil {
			return err
		}
	}
}

// wait sends the replies so far and receives more. While it waits, the connection holds no large
// buffer.
func (c *Conn) wait() error {
	if err := c.flush(); err != nil {
		return err
	}
	if err := c.inbox.receive(); err != nil {
		return err
	}
	c.absence = 0
	return nil
}

// flush sends the batch, if there is one.
func (c *Conn) flush() error {
	b := c.batch
	if b == nil && !c.meter.Timing() {
		return nil // without a look at the clock, which is a system call on some machines
	}
	now := clock()
	took := now - c.inbox.arrived()
	c.absence = took
	c.meter.Settle(now)
	if b == nil {
		return nil
	}
	c.counters.publish(&b.tally, took)
	if took >= c.export.slowRequest {
		for _, h := range b.asked[:b.replies] {
			c.export.noteSlow(h, took)
		}
	}
	c.inbox.yields.since = now
	err := c.outbox.flush(b)
	c.batch = nil
	faulted := b.faulted
	b.reset()
	b.release()
	batches.Put(b)
	if faulted != nil || err != nil {
		c.failFaulted(faulted, err)
	}
	return err
}

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

// dispatch executes a request whose header was taken, or lets a worker do so. Its error is that of
// the connection.
func (c *Conn) dispatch(h *wire.Request) error {
	e := c.export
	refused := e.check(*h)
	if e.judge.Active() {
		c.judged, c.judging = e.judge.Judge(c.inbox.arrived(), keyOf(h)), true
	} else if c.judging {
		c.judging = false
	}
	switch {
	case c.left.Load(), h.Changes() && c.outdated():
		return errHungUp
	case h.Command == wire.CmdWrite:
		return c.write(h, refused)
	case refused != nil:
		c.handOver(h, refused)
		return nil
	case h.Command == wire.CmdRead:
		return c.read(h)
	case h.Command == wire.CmdFlush && e.dev.Syncer == nil, h.Command != wire.CmdFlush && h.Length == 0:
		return c.succeed(h)
	default:
		return c.execute(h)
	}
}

// succeed answers a request that asked for nothing.
func (c *Conn) succeed(h *wire.Request) error {
	if err := c.open(h, 0, false); err != nil {
		return err
	}
	c.batch.commit(h)
	return nil
}

// read answers a READ in the batch, if that does not make the loop wait.
func (c *Conn) read(h *wire.Request) error {
	e, n := c.export, int(h.Length)
	switch p := &e.paces.Read; {
	case n == 0:
		return c.succeed(h)
	case e.dev.ReadTo != nil:
		// A backend that uses Buffer now and then will do so again: then there must be room before
		// the reply is begun.
		if err := c.open(h, n, n <= slabSize); err != nil {
			return err
		}
		return c.settle(h, c.readTo(h))
	case n <= slabSize && e.inline(p):
		if err := c.open(h, n, true); err != nil {
			return err
		}
		b := c.batch.Buffer(n)
		c.meter.Begin(p)
		err := c.readAt(b, h)
		c.meter.End(p, n)
		return c.settle(h, err)
	default:
		return c.execute(h)
	}
}

// gathers reports whether the payload of h is best received into the inbox, whatever its size:
// where the backend takes it from there, without another goroutine. Then a burst of large writes
// takes few system calls, too.
func (c *Conn) gathers(h *wire.Request) bool {
	e := c.export
	return h.Command == wire.CmdWrite && e.dev.WriteFrom == nil && c.inbox.holds(h.Length) && e.inline(&e.paces.Write) && !e.durably(*h)
}

// write executes a WRITE. If its payload has not arrived yet, it is a large one, which is received
// into the place where it is to stay, into the inbox, or into memory of its own.
func (c *Conn) write(h *wire.Request, refused *refusal) error {
	if h.Length > wire.MaxPayload {
		// No memory for it, and skipping up to 4 GiB is no way to treat a peer that breaks the
		// protocol.
		return fmt.Errorf("a write of %d bytes: more than %d", h.Length, wire.MaxPayload)
	}
	n := int(h.Length)
	arrived := len(c.inbox.received()) >= n
	if !arrived {
		// While the rest is on its way the client may wait for what it has asked before.
		if err := c.flush(); err != nil {
			return err
		}
		if refused == nil && c.gathers(h) {
			if got, err := c.inbox.gather(n); err != nil {
				c.inbox.putBack(append(h.Append(nil), got...))
				return err
			}
			arrived = true
			if c.outdated() { // It has waited for its payload.
				return errHungUp
			}
		}
	}
	e := c.export
	switch p := &e.paces.Write; {
	case refused != nil:
		return c.receiveWrite(h, refused)
	case n == 0:
		return c.succeed(h)
	case e.durably(*h):
		return c.receiveWrite(h, nil)
	case e.dev.WriteFrom != nil && (arrived || n <= maxKept || c.account == nil) && c.lockFast(h, arrived):
		c.payload = payload{inbox: &c.inbox, total: n, left: n, arrived: arrived}
		return c.settle(h, c.writeFrom(h))
	case e.dev.WriteFrom == nil && arrived && n <= maxInline && e.inline(p) && e.locks.TryAdd(&c.lock, c.owner, rangeOf(h)):
		b := c.inbox.take(n)
		c.payload = payload{total: n}
		c.meter.Begin(p)
		err := c.writeAt(b, h)
		c.meter.End(p, n)
		return c.settle(h, err)
	default:
		return c.receiveWrite(h, nil)
	}
}
