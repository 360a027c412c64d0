package server

import (
	"errors"
	"fmt"
	"os"
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
	for c.obey(err) {
		err = c.serve()
	}
	if flush := c.flush(); err == nil {
		err = flush
	}
	c.inbox.since.Store(0)
	finished = true
	c.result <- err
}

// obey carries out what the loop, which has ended with err, was told by control, and reports whether
// it goes on. Not a byte was lost: what had arrived of a request comes first again, and is checked
// anew.
func (c *Conn) obey(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	q, goOn := c.control.told()
	if !goOn || c.flush() != nil {
		return false
	}
	if q != nil && c.limit.Drained(&q.dropped) {
		close(q.reached)
		if q.release != nil {
			<-q.release
		}
	}
	return c.control.resume(q)
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
	for !c.control.stopping.Load() {
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
			c.inbox.expect(h, h.Command == wire.CmdWrite && c.situation(h).gathers())
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
	c.counters.Publish(&b.tally, took)
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

// dispatch carries out a request whose header was taken. Its error is that of the connection.
func (c *Conn) dispatch(h *wire.Request) error {
	e := c.export
	refused := e.check(*h)
	if e.judge.Active() {
		c.judged, c.judging = e.judge.Judge(c.inbox.arrived(), keyOf(h)), true
	} else if c.judging {
		c.judging = false
	}
	if c.left.Load() || h.Changes() && c.outdated() {
		return errHungUp
	}
	s := c.situation(h)
	s.refused = refused != nil
	p := planOf(h, e.can, s)
	if p == planGather {
		if err := c.gather(h); err != nil {
			return err
		}
		p = planOf(h, e.can, c.situation(h))
	}
	switch p {
	case planCut:
		return fmt.Errorf("a write of %d bytes: more than %d", h.Length, wire.MaxPayload)
	case planRefuse:
		return c.refuse(h, refused)
	case planNothing:
		return c.succeed(h)
	case planReadTo:
		return c.readTo(h)
	case planRead:
		return c.read(h)
	case planWriteFrom:
		return c.writeFrom(h)
	case planWrite:
		return c.write(h)
	default:
		return c.execute(h)
	}
}

// situation is the one that a request is met in, if it is not refused.
func (c *Conn) situation(h *wire.Request) situation {
	p := c.export.pace(h)
	return situation{
		inline:  p != nil && c.export.inline(p),
		arrived: uint64(len(c.inbox.received())) >= h.Length,
		room:    c.inbox.holds(h.Length),
		counted: c.account != nil,
	}
}
