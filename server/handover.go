package server

// receiveWrite receives the payload of a WRITE into memory of its own and has the request executed. A write that is refused is
// received like any other: its bytes must leave the stream, and until they all have, the request can still be handed over as
// unread.
func (c *Conn) receiveWrite(h *header, refused *refusal) error {
	if h.length == 0 {
		c.handOver(h, refused)
		return nil
	}
	c.enter(cost(*h))
	b := payloads.get(int(h.length))
	if n, err := c.inbox.readFull(b.bytes); err != nil {
		c.inbox.putBack(append(h.appendTo(nil), b.bytes[:n]...))
		payloads.put(b)
		c.gate.leave(cost(*h))
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
func (c *Conn) execute(h *header) {
	c.enter(cost(*h))
	c.start(h, nil)
}

// start has a request executed that is inside the gate: by a worker, or by the loop where that pays.
func (c *Conn) start(h *header, payload *buffer) {
	r := c.request(h)
	r.payload = payload
	if h.changes() && c.outdated() { // It has waited at the gate.
		r.err = errAbandoned
		go r.run()
		return
	}
	wait := h.changes() && c.export.claims.add(&r.claim, c, h)
	if pace := c.export.pace(*h); pace != nil && !wait && pace.alone.Load() {
		c.meter.settle(clock())
		r.alone = true
		r.run()
		return
	}
	go r.run()
}

// handOver has a request answered that failed or was refused. A worker does it: a batch is for replies that need no more thought.
func (c *Conn) handOver(h *header, err error) {
	c.absence = clock() - c.inbox.arrived()
	c.enter(cost(*h))
	r := c.request(h)
	r.err = err
	go r.run()
}

// request makes a request that is inside the gate.
func (c *Conn) request(h *header) *request {
	r, ok := requests.Get().(*request)
	if !ok {
		r = newRequest()
	}
	r.conn, r.header, r.cost, r.arrived = c, *h, cost(*h), c.inbox.arrived()
	c.flight.add(r)
	return r
}

// enter passes the gate. Before it waits there, the replies so far are sent; if that fails, the outbox knows.
func (c *Conn) enter(cost int64) {
	if !c.gate.tryEnter(cost) {
		_ = c.flush()
		c.gate.enter(cost)
		c.absence = clock() - c.inbox.arrived()
	}
}
