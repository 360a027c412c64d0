package server

import (
	"sync"
	"time"
)

// hoardPatience is how long a client may make the server wait for it, in the middle of a request or of a reply, while others wait for
// the memory that it holds.
const hoardPatience = 20 * time.Second

// A budget bounds the payload memory of all connections of a Server together, in bytes, as the gate of each does of one. Who comes
// while others wait, waits too. A client that neither sends what it has announced nor takes what it has asked for could keep
// everybody waiting; so who waits for hoardPatience has starved called, which is to see to it, again and again.
type budget struct {
	max     int64
	starved func()

	mu      sync.Mutex // guards all below
	changed sync.Cond  // something was given back
	used    int64
	waiting int
}

func newBudget(max int64, starved func()) *budget {
	b := &budget{max: max, starved: starved}
	b.changed.L = &b.mu
	return b
}

// tryTake takes bytes if they are there, and nobody waits for some.
func (b *budget) tryTake(bytes int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.waiting == 0 && b.grant(bytes)
}

// take waits for bytes.
func (b *budget) take(bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.grant(bytes) {
		return
	}
	b.waiting++
	done := false // guarded by mu
	var timer *time.Timer
	timer = time.AfterFunc(hoardPatience, func() {
		b.starved()
		b.mu.Lock()
		defer b.mu.Unlock()
		if !done {
			timer.Reset(hoardPatience)
		}
	})
	for !b.grant(bytes) {
		b.changed.Wait()
	}
	b.waiting--
	done = true
	timer.Stop()
}

// grant takes bytes if they are there. More than there ever are are taken alone. The caller holds mu.
func (b *budget) grant(bytes int64) bool {
	if b.used > 0 && b.used+bytes > b.max {
		return false
	}
	b.used += bytes
	return true
}

// giveBack undoes a take.
func (b *budget) giveBack(bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= bytes
	b.changed.Broadcast()
}
