package server

import (
	"slices"
	"sync"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/resend"
)

// A flight has the requests of a connection that are in flight and not in its batch, in the order
// in which they came. The zero value is empty. Safe for concurrent use.
type flight struct {
	mu     sync.Mutex // guards all below, and the two links, judged, lost and overdue of each request
	oldest *request
	newest *request
	count  int
	late   []late // the latest last

	ledger ledger
}

// late is a request that was answered because it was overdue.
type late struct {
	resend.Request
	at time.Duration
}

func (f *flight) add(r *request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.append(r)
}

// append is add. A request that is in the flight is in the ledger, too. The caller holds mu.
func (f *flight) append(r *request) {
	f.ledger.begin()
	r.older = f.newest
	if r.older == nil {
		f.oldest = r
	} else {
		r.older.newer = r
	}
	f.newest = r
	f.count++
}

// remove takes out a request whose reply was sent, or that needs none.
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
	f.ledger.end()
}

// unanswered returns the requests that the backend is to answer and nobody has, and what is known
// of each. The caller holds mu.
func (f *flight) unanswered() (waiting []*request, judged []resend.Request) {
	for r := f.oldest; r != nil; r = r.newer {
		if r.err == nil && !r.answered.Load() {
			waiting, judged = append(waiting, r), append(judged, r.judged)
		}
	}
	return waiting, judged
}

// lose returns what is known of all requests, and of those that were answered late since then, of
// each once.
func (f *flight) lose(since time.Duration) (all, answered []resend.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for r := f.oldest; r != nil; r = r.newer {
		// The client does not repeat what has failed.
		if !r.lost && !r.overdue {
			r.lost = true
			all = append(all, r.judged)
		}
	}
	for _, t := range f.late {
		if t.at >= since {
			answered = append(answered, t.Request)
		}
	}
	f.late = nil
	return all, answered
}

// told notes that a request was answered late.
func (f *flight) told(r resend.Request, now time.Duration, p resend.Patience) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tell(r, now, p)
}

// tell is told. The caller holds mu.
func (f *flight) tell(r resend.Request, now time.Duration, p resend.Patience) {
	f.late = slices.DeleteFunc(f.late, func(l late) bool { return l.at < now-p.Told() })
	f.late = append(f.late, late{r, now})
}

// stuck appends to all what the backend has of requests that came first at that time, or before,
// and of those that were answered without it.
func (f *flight) stuck(first time.Duration, all []resend.Key) []resend.Key {
	f.mu.Lock()
	defer f.mu.Unlock()
	for r := f.oldest; r != nil; r = r.newer {
		if r.overdue || r.lost && r.judged.First <= first {
			all = append(all, r.judged.Key)
		}
	}
	return all
}

// adopt finds out which requests came before, on a connection whose death has just been noted.
func (f *flight) adopt(now time.Duration, j *resend.Judge) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for r := f.oldest; r != nil; r = r.newer {
		j.Adopt(now, &r.judged)
	}
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

// inFlight returns how many requests the connection has in flight, and how long ago the oldest of
// them came.
func (c *Conn) inFlight() (count int, age time.Duration) {
	count, since := c.flight.now()
	if here := c.loop.inbox.arrived(); here != 0 {
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
