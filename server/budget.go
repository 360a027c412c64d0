package server

import (
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A client that neither sends what it has announced nor takes what it has asked for keeps memory for ever, and some of them could keep
// all there is. So turns are counted in which one and the same waiter, the first of them, was not served: a client that has held
// memory for hoardTurns, and only because the server waits for it, is disconnected. While what others hold goes round, all may be as
// slow as they like. A stop of the whole process is one turn at most, however long it takes.
const (
	budgetTurn = 5 * time.Second
	hoardTurns = 4
)

// A budget bounds the payload memory of the clients of an export together, in bytes, as the gate of each connection does of one. It is
// given to requests, first come first served. One that has some never waits for more, so that all get it as long as backends and
// clients do their part, and clients take replies while they send. Safe for concurrent use.
type budget struct {
	max     int64
	starved func(turn int64) // called after each turn, and the next is not begun before it returns

	turn atomic.Int64 // the present one

	mu     sync.Mutex // guards all below
	used   int64
	queue  []*waiter
	timing bool // next is going to be called
}

// A waiter waits for its part of a budget.
type waiter struct {
	conn    *Conn
	bytes   int64
	done    chan struct{} // closed when granted is valid
	granted bool
	seen    bool // as the first, budgetTurn ago
}

func newBudget(max int64, starved func(turn int64)) *budget {
	b := &budget{max: max, starved: starved}
	b.turn.Store(1) // 0 is never
	return b
}

// tryTake takes bytes if they are there, and nobody waits for some.
func (b *budget) tryTake(bytes int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.queue) == 0 && b.admit(bytes)
}

// take waits for bytes, and reports whether it has got them: not if the connection is closed before.
func (b *budget) take(bytes int64, c *Conn) bool {
	w := &waiter{conn: c, bytes: bytes, done: make(chan struct{})}
	b.mu.Lock()
	if c.closed.Load() { // Else its Close comes to forget, after this.
		b.mu.Unlock()
		return false
	}
	b.queue = append(b.queue, w)
	b.grant()
	if len(b.queue) > 0 && !b.timing {
		b.timing = true
		time.AfterFunc(budgetTurn, b.next)
	}
	b.mu.Unlock()
	<-w.done
	return w.granted
}

// giveBack gives back what was taken.
func (b *budget) giveBack(bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= bytes
	b.grant()
}

// forget has a connection, which is closed, wait no more.
func (b *budget) forget(c *Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queue = slices.DeleteFunc(b.queue, func(w *waiter) bool {
		if w.conn == c {
			close(w.done)
		}
		return w.conn == c
	})
	b.grant()
}

// grant gives to those who have waited for longest. The caller holds mu.
func (b *budget) grant() {
	n := 0
	for ; n < len(b.queue) && b.admit(b.queue[n].bytes); n++ {
		b.queue[n].granted = true
		close(b.queue[n].done)
	}
	b.queue = slices.Delete(b.queue, 0, n)
}

// admit takes bytes if there is room. What is more than the bound goes alone. The caller holds mu.
func (b *budget) admit(bytes int64) bool {
	if b.used > 0 && b.used+bytes > b.max {
		return false
	}
	b.used += bytes
	return true
}

// next looks after those who wait, as long as there are any.
func (b *budget) next() {
	b.mu.Lock()
	b.timing = len(b.queue) > 0
	waiting, again := b.timing, false
	if waiting {
		again = b.queue[0].seen
		b.queue[0].seen = true
	}
	b.mu.Unlock()
	if again {
		b.starved(b.turn.Add(1))
	}
	if waiting {
		time.AfterFunc(budgetTurn, b.next)
	}
}

// budget returns that of an export.
func (s *Server) budget(e *Export) *budget {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.budgets[e]
	if b == nil {
		limit := s.MaxMemory
		if limit <= 0 {
			limit = defaultMaxMemory
		}
		b = newBudget(limit, func(turn int64) { s.evict(e, turn) })
		if s.budgets == nil {
			s.budgets = make(map[*Export]*budget)
		}
		s.budgets[e] = b
	}
	return b
}

// evict disconnects the clients of an export that keep memory from others.
func (s *Server) evict(e *Export, turn int64) {
	s.mu.Lock()
	conns := slices.Collect(maps.Keys(s.clients.conns))
	s.mu.Unlock()
	for _, c := range conns {
		if c.export == e && !c.closed.Load() && c.hoards(turn) {
			s.logger().Warn("client disconnected: others wait for memory that it holds, and it does not take a reply or send its data",
				slog.String("client", c.nc.RemoteAddr().String()))
			go c.Close() // which may take its time
		}
	}
}

// hoards reports whether the client has kept memory for too long at the given turn, by making the server wait for it.
func (c *Conn) hoards(turn int64) bool {
	if since := c.receiving.Load(); since != 0 && turn-since >= hoardTurns {
		return true
	}
	return c.flight.unsent(turn - hoardTurns)
}
