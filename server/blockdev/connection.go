package blockdev

import (
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// A transmitter serves one socket to its end, as a *server.Conn does, or watches it.
type transmitter interface {
	Transmit() error
	Stopped() <-chan struct{}
	Disconnected() bool
	Away() bool
	Absence() time.Duration
	// Idle reports whether it has carried nothing.
	Idle() bool
	Stats() server.Stats
	Close() error
}

// A connection is one of those that the kernel knows a device to have. Transmitters serve it, one
// after the other: when one dies, another one takes its place. The lock of the set guards all
// fields but number, which does not change. What each transmitter has served counts once: in past,
// or as long as it is conn or behind.
type connection struct {
	number int
	conn   transmitter              // the present one, or the last; only the goroutine of keep changes it
	behind map[transmitter]struct{} // dead ones that the backend has not let go of
	past   server.Stats             // of those that are neither
	alive  bool                     // conn is served
	dead   time.Time                // when the kernel may have taken the last one for dead, at the earliest
}

func newConnection(number int, t transmitter) *connection {
	return &connection{number: number, conn: t, behind: make(map[transmitter]struct{}), alive: true}
}

// stats returns what was served over the connection so far.
func (c *connection) stats() server.Stats {
	stats, now := c.past, c.conn.Stats()
	stats.Add(&now)
	for t := range c.behind {
		if t != c.conn {
			now = t.Stats()
			stats.Add(&now)
		}
	}
	return stats
}

// fold keeps the counts of a transmitter whose place another one has, without keeping it.
func (c *connection) fold(t transmitter) {
	stats := t.Stats()
	c.past.Add(&stats)
}

// died notes that the present one is dead. The kernel may have taken it for dead earlier: it gives
// a connection up when a request has had its timeout, which was not seen while the loop was in a
// call of the backend.
func (c *connection) died(timeout time.Duration) {
	c.alive, c.dead = false, time.Now()
	if w, ok := c.conn.(*watched); ok && !w.since.IsZero() {
		c.dead = w.since
	}
	if late := c.conn.Absence() - timeout; late > 0 {
		c.dead = c.dead.Add(-late)
	}
}

// restored puts another one in the place of one that has died.
func (c *connection) restored(t transmitter) {
	if _, ok := c.behind[c.conn]; !ok {
		c.fold(c.conn)
	}
	c.conn, c.alive = t, true
}
