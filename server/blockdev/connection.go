package blockdev

import (
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// A transmitter serves one socket to its end, as a *server.Conn does.
type transmitter interface {
	Transmit() error
	Stopped() <-chan struct{}
	Disconnected() bool
	Away() bool
	Absence() time.Duration
	Stats() server.Stats
	Close() error
}

// A connection is one of those that the kernel knows a device to have. When what serves it dies,
// something else takes its place. The fields are guarded by the lock of the set.
type connection struct {
	number int
	conn   transmitter              // the present one, or the last
	behind map[transmitter]struct{} // dead ones that the backend has not let go of
	past   server.Stats             // of those before
	alive  bool                     // conn is served
	dead   time.Time                // when the kernel has taken the last one for dead that was, at the earliest
}

func newConnection(number int, c transmitter) *connection {
	return &connection{number: number, conn: c, behind: make(map[transmitter]struct{}), alive: true}
}

// stats returns what was served over the connection so far.
func (s *connection) stats() server.Stats {
	stats, now := s.past, s.conn.Stats()
	stats.Add(&now)
	for c := range s.behind {
		if c != s.conn {
			now = c.Stats()
			stats.Add(&now)
		}
	}
	return stats
}

// fold keeps the counts of a transmitter whose place another one has, without keeping it.
func (s *connection) fold(c transmitter) {
	stats := c.Stats()
	s.past.Add(&stats)
}

// died notes that the present one is dead. The kernel may have taken it for that earlier: it gives
// a connection up when a request has had its timeout, which was not seen while the loop was in a
// call of the backend.
func (s *connection) died(timeout time.Duration) {
	s.alive, s.dead = false, time.Now()
	if late := s.conn.Absence() - timeout; late > 0 {
		s.dead = s.dead.Add(-late)
	}
}

// restored puts another one in the place of one that has died.
func (s *connection) restored(c transmitter) {
	if _, ok := s.behind[s.conn]; !ok {
		s.fold(s.conn)
	}
	s.conn, s.alive = c, true
}

// idle reports whether the last one has carried nothing.
func (s *connection) idle() bool {
	n := s.conn.Stats()
	return n.InFlight == 0 && n.Read.Requests+n.Write.Requests+n.Flush.Requests+n.Trim.Requests+
		n.WriteZeroes.Requests+n.Unknown.Requests == 0
}
