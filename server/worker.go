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
func (l *loop) execute(h *wire.Request) error {
	if h.Command == wire.CmdWrite {
		return l.receive(h, nil)
	}
	if !l.enter(l.cost(h)) {
		return net.ErrClosed
	}
	l.start(h, nil)
	return nil
}

func (l *loop) cost(h *wire.Request) int64 { return cost(h, len(l.conn.agreed.Contexts)) }

// refuse has a request answered with an error. Its payload must leave the stream before, and until
// all of that has, the request can still be handed over as unread.
func (l *loop) refuse(h *wire.Request, refused error) error {
	if h.Payload(l.extended()) > 0 {
		return l.receive(h, refused)
	}
	l.handOver(h, refused)
	return nil
}

// receive receives a payload into memory of its own and has the request, most often a WRITE,
// carried out, or refused.
func (l *loop) receive(h *wire.Request, refused error) error {
	cost := payloadCost(h.Length)
	if len(l.inbox.received()) < int(h.Length) {
		// While the rest is on its way the client may wait for what it has asked before.
		if err := l.flush(); err != nil {
			return err
		}
	}
	if !l.enter(cost) {
		return net.ErrClosed
	}
	b := payloads.get(int(h.Length))
	n, err := l.receivePayload(b.bytes)
	if err != nil {
		// Of a stream that has ended nothing is worth its memory: nobody counts it, and the
		// connection may stay until the client has taken its replies.
		if errors.Is(err, os.ErrDeadlineExceeded) {
			l.putBack(h, b.bytes[:n])
		}
		payloads.put(b)
		l.conn.exit(cost)
		return err
	}
	if refused != nil {
		r := l.request(h, cost)
		r.payload, r.err = b, refused
		l.conn.flight.add(r)
		go r.run()
		return nil
	}
	l.start(h, b)
	return nil
}

// receivePayload fills p, for which memory was taken.
func (l *loop) receivePayload(p []byte) (int, error) {
	if l.conn.account != nil {
		l.conn.account.Receiving()
		defer l.conn.account.Received()
	}
	return l.inbox.readFull(p)
}

// start has a request carried out that is within the limits: by a worker, or by the loop where that
// pays. Which one it is depends on this moment, for the request may have waited since its plan was
// made.
func (l *loop) start(h *wire.Request, payload *buffer) {
	r := l.request(h, l.cost(h))
	r.payload = payload
	if h.Changes() && l.outdated() { // It has waited for room, or for memory.
		r.err = rangelock.ErrAbandoned
		l.conn.flight.add(r)
		go r.run()
		return
	}
	wait := h.Changes() && l.export.locks.Add(&r.lock, l.conn.owner, rangeOf(h))
	l.conn.flight.add(r)
	if p := l.export.pace(h); p != nil && !wait && l.export.inline(p) {
		l.meter.Settle(clock())
		r.inline = true
		r.run()
		return
	}
	go r.run()
}

// handOver has a request answered that failed or was refused, and needs no memory any more. A
// worker does it: a batch is for replies that need no more thought.
func (l *loop) handOver(h *wire.Request, err error) {
	l.absence = clock() - l.inbox.arrived()
	l.enter(0)
	r := l.request(h, 0)
	r.err = err
	l.conn.flight.add(r)
	go r.run()
}

// request makes a request that has entered at that cost. It goes to the flight when it is complete:
// from then on others look at it.
func (l *loop) request(h *wire.Request, cost int64) *request {
	r, ok := requests.Get().(*request)
	if !ok {
		r = newRequest()
	}
	r.conn, r.Request, r.cost, r.arrived = l.conn, *h, cost, l.inbox.arrived()
	r.chosen = l.chosen
	if l.judging && l.judged.Key == keyOf(h) {
		r.judged = l.judged
	} else {
		r.judged = resend.Request{Key: keyOf(h), Arrived: r.arrived, First: r.arrived}
	}
	return r
}

// enter waits for room for a request, among those of the connection and in the memory for all of
// them; there it gives up, and returns false, when the connection is closed. Before it waits, the
// replies so far are sent; if that fails, the outbox knows.
func (l *loop) enter(cost int64) bool {
	if !l.conn.limit.TryEnter(cost) {
		_ = l.flush()
		l.conn.limit.Enter(cost)
		l.absence = clock() - l.inbox.arrived()
	}
	if l.conn.account == nil || cost == 0 || l.conn.account.TryTake(cost) {
		return true
	}
	_ = l.flush()
	got := l.conn.account.Take(cost)
	if !got {
		l.conn.limit.Leave(cost)
	}
	l.absence = clock() - l.inbox.arrived()
	return got
}

// exit gives back what enter has taken.
func (c *Conn) exit(cost int64) {
	if c.account != nil && cost > 0 {
		c.account.GiveBack(cost)
	}
	c.limit.Leave(cost)
}
