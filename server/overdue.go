package server

import (
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/pace"
	"github.com/nbdctl/nbdctl/server/internal/rangelock"
	"github.com/nbdctl/nbdctl/server/internal/resend"
	"github.com/nbdctl/nbdctl/server/wire"
)

// errOverdue is the outcome of a request that was answered although the backend is still at work on
// it.
var errOverdue = errors.New("the backend has not come back from it, " +
	"and the client has sent it again for as long as it may")

// A Patience is how a client behaves that gets no reply.
type Patience struct {
	// Resend is after how long the client gives up the connection, and sends the request again over
	// another one. 0: it never does.
	Resend time.Duration
	// Total is how long after the first time a request that was sent again is answered with an
	// error, whatever the backend does. The answer comes 3 s later at the latest, if the client has
	// a connection then.
	Total time.Duration
}

// SetPatience tells how clients behave. The server then knows a request that was sent again, counts
// its time from when it came first, and answers it with EIO when Total is over. The backend may
// still be at work on it: what it changes is kept from everybody else until it has come back (see
// the package documentation).
//
// It is for clients that send requests again without an end, as Linux does. It holds for what
// arrives from then on.
func (e *Export) SetPatience(p Patience) {
	e.judge.SetPatience(resend.Patience(p))
	e.mu.Lock()
	defer e.mu.Unlock()
	e.noteAbilities()
}

// inline reports whether the loop may make a plain call. While requests may come again it makes
// none, because it could not answer others then.
func (e *Export) inline(p *pace.Pace) bool { return p.Inline() && !e.judge.Active() }

// key returns what the request asks for.
func keyOf(h *wire.Request) resend.Key {
	return resend.Key{Op: uint16(h.Command), Offset: h.Offset, Length: h.Length}
}

// lose notes what the connection, which is dead or about to be, leaves unanswered: the client may
// send it again. It comes before what waits for its turn is given up. more tells that there is
// something of which nothing is known.
func (c *Conn) lose(more bool) {
	e := c.export
	if c.disconnected.Load() || e.judge.Patience().Resend == 0 {
		return
	}
	now := clock()
	all, answered := c.flight.lose(now - e.judge.Patience().Told())
	e.judge.Lost(now, all, answered, more)
	e.mu.Lock()
	defer e.mu.Unlock()
	for other := range e.live {
		if other != c {
			other.flight.adopt(now, &e.judge)
		}
	}
	e.tendLater()
}

// tendLater has the requests in flight looked at, as long as some may have been sent again. The
// caller holds mu.
func (e *Export) tendLater() {
	if e.tending == nil && len(e.live) > 0 && e.judge.Active() {
		e.tending = time.AfterFunc(e.judge.Patience().Tick(), e.tend)
	}
}

// tend answers what is overdue.
func (e *Export) tend() {
	now, repeats := clock(), false
	e.mu.Lock()
	conns := make([]*Conn, 0, len(e.live))
	for c := range e.live {
		conns = append(conns, c)
	}
	e.mu.Unlock()
	var answers []*request
	var stuck []resend.Key
	total := e.judge.Patience().Total
	for _, c := range conns {
		if !c.abandoned() {
			more, again := c.overdue(now)
			answers, repeats = append(answers, more...), repeats || again
		}
		stuck = c.flight.stuck(now-total, stuck)
	}
	for _, r := range e.locks.Stuck() {
		stuck = append(stuck, resend.Key{Offset: r.First, Length: r.End - r.First})
	}
	e.judge.SetStuck(stuck) // before anybody is told, and tries again
	for _, a := range answers {
		go a.run()
	}
	if len(answers) > 0 {
		e.admission.wake()
	}
	repeats = repeats || e.deserted() // Somebody may wait to be admitted.
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tending = nil
	if !e.judge.Quiet(now, repeats) {
		e.tendLater()
	}
}

// overdue takes what is overdue on one connection from the backend, which is still at work on it,
// and returns answers in their place. repeats tells that requests are in flight there that were
// sent again.
func (c *Conn) overdue(now time.Duration) (answers []*request, repeats bool) {
	e, f := c.export, &c.flight
	f.mu.Lock() // Nothing that is in flight comes to be used for something else meanwhile.
	defer f.mu.Unlock()
	waiting, requests := f.unanswered()
	for _, i := range e.judge.Overdue(now, requests) {
		r := waiting[i]
		if r.answered.Swap(true) {
			continue
		}
		r.overdue = true
		e.locks.Orphan(&r.lock)
		c.limit.Join()
		a := newRequest()
		a.conn, a.Request, a.arrived, a.judged, a.err = c, r.Request, r.arrived, r.judged, errOverdue
		a.lost = true // It is told; the client may repeat it if it does not get that.
		f.append(a)
		f.tell(r.judged, now, e.judge.Patience())
		answers = append(answers, a)
	}
	return answers, slices.ContainsFunc(requests, resend.Request.Repeated)
}

// minDeserted is how many requests a backend may always hang in before it gets no more.
const minDeserted = 16

// An admission bounds what dead connections may leave behind in the backend. Who waits there waits
// for its connection, too.
type admission struct {
	mu      sync.Mutex // held from the look to the wait
	changed sync.Cond  // somebody has left, or waits for nothing
}

func (a *admission) wake() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.changed.Broadcast()
}

// admit lets a request go to the backend, unless that has not come back from as much of dead
// connections as one connection may have in flight. Then it waits: a backend that hangs takes no
// more than that, however many connections it costs.
func (e *Export) admit(r *request) error {
	a := &e.admission
	a.mu.Lock()
	defer a.mu.Unlock()
	for e.deserted() {
		if r.conn.abandoned() || r.answered.Load() {
			return rangelock.ErrAbandoned
		}
		a.changed.Wait()
	}
	return nil
}

// deserted reports whether dead connections have as much in flight as one connection may have.
func (e *Export) deserted() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	requests, bytes := 0, int64(0)
	for c := range e.live {
		if c.abandoned() {
			r, b := c.limit.InFlight()
			requests, bytes = requests+r, bytes+b
		}
	}
	return requests >= max(e.maxInFlight, minDeserted) || bytes >= maxInFlightBytes
}
