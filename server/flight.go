package server

import (
	"sync"
	"time"
)

// A flight has the requests of a connection that are in flight and not in its batch, in the order in which they came. The zero
// value is empty. Safe for concurrent use.
type flight struct {
	mu     sync.Mutex // guards all below, and the two links and bound of each request
	oldest *request
	newest *request
	count  int
}

func (f *flight) add(r *request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r.older = f.newest
	if r.older == nil {
		f.oldest = r
	} else {
		r.older.newer = r
	}
	f.newest = r
	f.count++
}

func (f *flight) remove(r *request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.older == nil {
		f.oldest = r.newer
	} else {
		r.older.newer = r.newer
	}
	if r.newer == nil {
		f.newest = r.older
	} else {
		r.newer.older = r.older
	}
	f.count--
}

// bind notes that the request is done, and holds its memory only until the client has taken the reply; turn is that of the budget.
func (f *flight) bind(r *request, turn int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r.bound = turn
}

// unsent reports whether a request that holds memory has been so since that turn, or before.
func (f *flight) unsent(turn int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for r := f.oldest; r != nil; r = r.newer {
		if r.cost > 0 && r.bound != 0 && r.bound <= turn {
			return true
		}
	}
	return false
}

// now returns how many requests there are, and when the oldest of them came.
func (f *flight) now() (count int, since time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.oldest == nil {
		return 0, 0
	}
	return f.count, f.oldest.arrived
}

// inFlight returns how many requests the connection has in flight, and how long ago the oldest of them came.
func (c *Conn) inFlight() (count int, age time.Duration) {
	count, since := c.flight.now()
	if here := c.inbox.arrived(); here != 0 {
		// What workers have came before it, if they have anything.
		if count == 0 {
			since = here
		}
		count++
	}
	if count == 0 {
		return 0, 0
	}
	return count, clock() - since
}
