// Package admit has the limits on what clients may make a server hold, and who holds how much: a
// Connection for the requests of one client, a Memory for the data of all of them.
//
// A request is admitted before memory is taken for it, so a client that sends more than the limits
// simply finds its socket full.
package admit

import (
	"sync"
	"sync/atomic"
)

// A Connection limits what one client has in flight, by number of requests and by bytes of memory
// for their data. A request that is larger than the limit is admitted alone. Safe for concurrent
// use; one goroutine at a time waits for room.
type Connection struct {
	maxRequests int
	maxBytes    int64

	mu       sync.Mutex // guards the two counts and waiting
	changed  sync.Cond  // a request has left
	requests int
	bytes    int64
	waiting  bool // somebody, for room
}

// NewConnection returns a limit of that many requests, with data of that many bytes together.
func NewConnection(maxRequests int, maxBytes int64) *Connection {
	c := &Connection{maxRequests: maxRequests, maxBytes: maxBytes}
	c.changed.L = &c.mu
	return c
}

// TryEnter admits a request if there is room.
func (c *Connection) TryEnter(bytes int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.admit(bytes)
}

// Enter admits a request as soon as there is room.
func (c *Connection) Enter(bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.admit(bytes) {
		c.waiting = true
		c.changed.Wait()
	}
	c.waiting = false
}

// admit admits a request if there is room. The caller holds mu.
func (c *Connection) admit(bytes int64) bool {
	if c.requests > 0 && (c.requests >= c.maxRequests || c.bytes+bytes > c.maxBytes) {
		return false
	}
	c.requests++
	c.bytes += bytes
	return true
}

// Join admits a request that takes no memory, although there may be no room.
func (c *Connection) Join() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests++
}

// Leave ends a request that was admitted with that many bytes.
func (c *Connection) Leave(bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests--
	c.bytes -= bytes
	c.changed.Broadcast()
}

// InFlight returns what was admitted and has not left.
func (c *Connection) InFlight() (requests int, bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.requests, c.bytes
}

// IfWaiting calls f if somebody waits for room, who does not get it before f has returned. It
// reports whether it did.
func (c *Connection) IfWaiting(f func()) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waiting {
		f()
	}
	return c.waiting
}

// Drained waits until nothing is in flight, or until giveUp is set and Wake called, and reports
// whether nothing is. giveUp may be nil.
func (c *Connection) Drained(giveUp *atomic.Bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.requests > 0 && (giveUp == nil || !giveUp.Load()) {
		c.changed.Wait()
	}
	return c.requests == 0
}

// Wake has those who wait look again.
func (c *Connection) Wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed.Broadcast()
}
