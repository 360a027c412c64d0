package server

import (
	"syscall"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/rawio"
)

// hangupGrace is what the loop of a connection has to notice by itself that the client has hung up.
const hangupGrace = 100 * time.Millisecond

// watch notices that the client hangs up while anything waits for the backend, where that matters
// at once: for a client that sends everything again over another connection, and for a backend that
// can give up. stop waits until it is over; the loop has ended then.
func (c *Conn) watch() (stop func()) {
	none := func() {}
	socket, ok := c.socket.(syscall.Conn)
	if !ok || !c.export.watchful.Load() {
		return none
	}
	stop, err := rawio.WatchHangup(socket, c.hangup)
	if err != nil { // It will see for itself, later.
		return none
	}
	return stop
}

// hangup ends the context of the backend's calls. If the loop is kept by one all the same, or by
// what is in flight, it seals the connection. What is lost is noted first, for the calls may return
// at once.
func (c *Conn) hangup() {
	since := clock()
	c.lose(false)
	c.cancel()
	tick := time.NewTicker(hangupGrace)
	defer tick.Stop()
	for more := true; ; {
		select {
		case <-c.looped:
			c.leave()
			return
		case <-tick.C:
		}
		// A loop that has not run meanwhile, as when the process stood still, has not seen what
		// there is to see yet.
		if begun := c.loop.inbox.arrived(); begun == 0 || clock()-begun < hangupGrace {
			continue
		}
		if more {
			c.lose(true) // What lies unread is not known.
			more = false
		}
		if c.seal() {
			c.export.admission.wake()
			c.halt(clock() - since)
			return
		}
	}
}

// halt notes that nothing more will be begun. away is for how long the loop did not see that, if it
// has not.
func (c *Conn) halt(away time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.halted {
		c.halted, c.away = true, away
		close(c.stopped)
	}
}

// seal keeps the loop, which is away, from executing anything more that changes bytes, and reports
// whether it could: a write that is being made without a lock can land at any time. What the loop
// has in the backend has its lock.
func (c *Conn) seal() bool {
	e := c.export
	e.mu.Lock() // No other backend takes the place meanwhile.
	defer e.mu.Unlock()
	if e.direct.Load() && !c.limit.IfWaiting(func() { c.left.Store(true) }) {
		return false
	}
	c.left.Store(true)
	e.locks.Seal(c.owner)
	return true
}
