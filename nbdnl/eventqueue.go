package nbdnl

import (
	"sync"
)

// maxQueued bounds the changed devices that are queued one by one; with more, all are to be looked
// at.
const maxQueued = 1024

// An eventQueue collects what the kernel says of devices until somebody looks at them. Events of
// one device become one. Its methods may be called concurrently.
type eventQueue struct {
	wake chan struct{} // has an element when there is something new

	mu     sync.Mutex // guards queued
	queued kernelEvents
}

// kernelEvents are the devices that the kernel has spoken of.
type kernelEvents struct {
	all     bool         // any device may have changed
	added   bool         // some were added
	changed map[int]bool // these have
	dead    map[int]bool // connections of these have died
}

func newEventQueue() *eventQueue { return &eventQueue{wake: make(chan struct{}, 1)} }

// change queues that a device may have changed, or was added.
func (q *eventQueue) change(index int, added bool) {
	q.put(func(e *kernelEvents) {
		e.added = e.added || added
		if e.all = e.all || len(e.changed) >= maxQueued; e.all {
			e.changed = nil
			return
		}
		set(&e.changed, index)
	})
}

// changeAll queues that any device may have changed.
func (q *eventQueue) changeAll() {
	q.put(func(e *kernelEvents) { e.all, e.changed = true, nil })
}

// death queues that connections of a device have died. Indexes are limited, and so are these
// events.
func (q *eventQueue) death(index int) {
	q.put(func(e *kernelEvents) { set(&e.dead, index) })
}

func (q *eventQueue) put(add func(*kernelEvents)) {
	q.mu.Lock()
	add(&q.queued)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// take returns what is queued and empties the queue.
func (q *eventQueue) take() kernelEvents {
	q.mu.Lock()
	defer q.mu.Unlock()
	e := q.queued
	q.queued = kernelEvents{}
	return e
}

func set(m *map[int]bool, index int) {
	if *m == nil {
		*m = make(map[int]bool)
	}
	(*m)[index] = true
}
