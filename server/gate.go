package server

import (
	"sync"
	"sync/atomic"
)

// A gate bounds what a connection has in flight, by number of requests and by bytes of payload memory. The reader passes it
// before it takes memory for a request, so a client that sends more than the bounds simply finds its socket full.
type gate struct {
	maxRequests int
	maxBytes    int64

	mu       sync.Mutex // guards the two counts and waiting
	changed  sync.Cond  // a request has left
	requests int
	bytes    int64
	waiting  bool // the loop, for room
}

func newGate(maxRequests int, maxBytes int64) *gate {
	g := &gate{maxRequests: maxRequests, maxBytes: maxBytes}
	g.changed.L = &g.mu
	return g
}

// tryEnter goes in if there is room. A request larger than the bound goes in alone.
func (g *gate) tryEnter(bytes int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.admit(bytes)
}

// enter waits for room.
func (g *gate) enter(bytes int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for !g.admit(bytes) {
		g.waiting = true
		g.changed.Wait()
	}
	g.waiting = false
}

// admit goes in if there is room. The caller holds the lock.
func (g *gate) admit(bytes int64) bool {
	if g.requests > 0 && (g.requests >= g.maxRequests || g.bytes+bytes > g.maxBytes) {
		return false
	}
	g.requests++
	g.bytes += bytes
	return true
}

// join goes in although there may be no room, with something that takes no memory.
func (g *gate) join() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.requests++
}

// load returns what is inside.
func (g *gate) load() (requests int, bytes int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.requests, g.bytes
}

// ifWaiting calls f if somebody waits for room, who does not get it before f has returned. It reports whether it did.
func (g *gate) ifWaiting(f func()) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.waiting {
		f()
	}
	return g.waiting
}

// leave gives back what enter took.
func (g *gate) leave(bytes int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.requests--
	g.bytes -= bytes
	g.changed.Broadcast()
}

// drained waits until nothing is in flight, or until giveUp is set and wake called, and reports whether nothing is.
func (g *gate) drained(giveUp *atomic.Bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.requests > 0 && (giveUp == nil || !giveUp.Load()) {
		g.changed.Wait()
	}
	return g.requests == 0
}

// wake has those who wait look again.
func (g *gate) wake() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.changed.Broadcast()
}
