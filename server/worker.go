package server

import (
	"errors"
	"net"
	"os"

	"github.com/nbdctl/nbdctl/server/internal/rangelock"
	"github.com/nbdctl/nbdctl/server/internal/resend"
	"github.com/nbdctl/nbdctl/server/wire"
)

// The executors of plans that take a request out of the batch: it has memory of its own, within the
// limits, and a worker carries it out, or the loop, where that is quick.

// execute has a request carried out.
func (c *Conn) execute(h *wire.Request) error {
	if h.Command == wire.CmdWrite {
		return c.receiveWrite(h, nil)
	}
	if !c.enter(cost(*h)) {
		return net.ErrClosed
	}
	c.start(h, nil)
	return nil
}

// refuse has a request answered with an error. The bytes of a write must leave the stream before,
// and until they all have, the request can still be handed over as unread.
func (c *Conn) refuse(h *wire.Request, refused *refusal) error {
	if h.Command == wire.CmdWrite && h.Length > 0 {
		return c.receiveWrite(h, refused)
	}
	c.handOver(h, refused)
	return nil
}

// receiveWrite receives the payload of a WRITE into memory of its own and has the request carried
// out, or refused.
func (c *Conn) receiveWrite(h *wire.Request, refused *refusal) error {
	if len(c.inbox.received()) < int(h.Length) {
		// While the rest is on its way the client may wait for what it has asked before.
		if err := c.flush(); err != nil {
			return err
		}
	}
	if !c.enter(cost(*h)) {
		return net.ErrClosed
	}
	b := payloads.get(int(h.Length))
	n, err := c.receivePayload(b.bytes)
	if err != nil {
		// Of a stream that has ended nothing is worth its memory: nobody counts it, and the
		// connection may stay until the client has taken its replies.
		if errors.Is(err, os.ErrDeadlineExceeded) {
			c.inbox.putBack(append(h.Append(nil), b.bytes[:n]...))
		}
		payloads.put(b)
		c.exit(cost(*h))
		return err
	}
	if refused != nil {
		r := c.request(h, cost(*h))
		r.payload, r.err = b, refused
		c.flight.add(r)
		go r.run()
		return nil
	}
	c.start(h, b)
	return nil
}

// receivePayload fills p, for which memory was taken.
func (c *Conn) receivePayload(p []byte) (int, error) {
	if c.account != nil {
		c.account.Receiving()
		defer c.account.Received()
	}
	return c.inbox.readFull(p)
}

// start has a request carried out that is within the limits: by a worker, or by the loop where that
// pays. Which one it is depends on this moment, for the request may have waited since its plan was
// made.
func (c *Conn) start(h *wire.Request, payload *buffer) {
	r := c.request(h, cost(*h))
	r.payload = payload
	if h.Changes() && c.outdated() { // It has waited for room, or for memory.
		r.err = rangelock.ErrAbandoned
		c.flight.add(r)
		go r.run()
		return
	}
	wait := h.Changes() && c.export.locks.Add(&r.lock, c.owner, rangeOf(h))
	c.flight.add(r)
	if p := c.export.pace(h); p != nil && !wait && c.export.inline(p) {
		c.meter.Settle(clock())
		r.inline = true
		r.run()
		return
	}
	go r.run()
}

// handOver has a request answered that failed or was refused, and needs no memory any more. A
// worker does it: a batch is for replies that need no more thought.
func (c *Conn) handOver(h *wire.Request, err error) {
	c.absence = clock() - c.inbox.arrived()
	c.enter(0)
	r := c.request(h, 0)
	r.err = err
	c.flight.add(r)
	go r.run()
}

// request makes a request that has entered at that cost. It goes to the flight when it is complete:
// from then on others look at it.
func (c *Conn) request(h *wire.Request, cost int64) *request {
	r, ok := requests.Get().(*request)
	if !ok {
		r = newRequest()
	}
	r.conn, r.Request, r.cost, r.arrived = c, *h, cost, c.inbox.arrived()
	if c.judging && c.judged.Key == keyOf(h) {
		r.judged = c.judged
	} else {
		r.judged = resend.Request{Key: keyOf(h), Arrived: r.arrived, First: r.arrived}
	}
	return r
}

// enter waits for room for a request, among those of the connection and in the memory for all of
// them; there it gives up, and returns false, when the connection is closed. Before it waits, the
// replies so far are sent; if that fails, the outbox knows.
func (c *Conn) enter(cost int64) bool {
	if !c.limit.TryEnter(cost) {
		_ = c.flush()
		c.limit.Enter(cost)
		c.absence = clock() - c.inbox.arrived()
	}
	if c.account == nil || cost == 0 || c.account.TryTake(cost) {
		return true
	}
	_ = c.flush()
	got := c.account.Take(cost)
	if !got {
		c.limit.Leave(cost)
	}
	c.absence = clock() - c.inbox.arrived()
	return got
}

// exit gives back what enter has taken.
func (c *Conn) exit(cost int64) {
	if c.account != nil && cost > 0 {
		c.account.GiveBack(cost)
	}
	c.limit.Leave(cost)
}
