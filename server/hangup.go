package server

import "time"

// hangupGrace is what the loop of a connection has to notice by itself that the client has hung up.
const hangupGrace = 100 * time.Millisecond

// watch notices that the client hangs up while the loop waits for the backend, where that matters at once: for a client that sends
// everything again over another connection, and for a backend that can give up. stop waits until it is over; the loop has ended then.
func (c *Conn) watch() (stop func()) {
	if !c.export.watchful.Load() {
		return func() {}
	}
	return watchHangup(c.nc, c.hangup)
}

// hangup ends the context of the backend's calls. If the loop is kept by one all the same, or by what is in flight, it seals the
// connection.
func (c *Conn) hangup() {
	c.cancel()
	tick := time.NewTicker(hangupGrace)
	defer tick.Stop()
	select {
	case <-c.looped:
		return
	case <-tick.C:
		c.lose(true)
	}
	for !c.seal() {
		select {
		case <-c.looped:
			return
		case <-tick.C:
		}
	}
	c.away = max(clock()-c.inbox.arrived(), 1)
	close(c.stopped)
}

// seal keeps the loop, which is away, from executing anything more that changes bytes, and reports whether it could: a write that is
// being made without a claim can land at any time. What the loop has in the backend has its claim.
func (c *Conn) seal() bool {
	e := c.export
	if e.direct.Load() && !c.gate.ifWaiting(func() { c.left.Store(true) }) {
		return false
	}
	e.claims.seal(c)
	e.admission.wake()
	return true
}
