// Package resend judges the requests that a client sends again.
//
// The Linux client gives a connection up when a request on it has waited for its timeout, and sends
// the request again over another connection, as often as it takes (nbd.c, nbd_xmit_timeout): each
// connection begins the time anew. A backend that is slower than the timeout would be asked for
// ever. A Judge knows a repetition by what it asks for, counts its time from when the request came
// first, and says when it is to be answered with an error.
//
// All times are readings of one monotonic clock, which the caller has. The methods are safe for
// concurrent use.
package resend

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// grace is the least time that a repetition has. A sound backend answers within it what only
	// looks like one.
	grace = time.Second
	// strayed is how long after its total a request may come again. It is answered within 3 s after
	// the total then, grace and the rounding of the client's timer included.
	strayed = 500 * time.Millisecond
	// rounding is how much later than told the client's timer may fire: it counts in whole seconds
	// (blk_add_timer).
	rounding = 2 * time.Second
	// maxLost bounds the requests that are remembered. The oldest are forgotten first.
	maxLost = 4096
)

// A Patience is how a client behaves.
type Patience struct {
	Resend time.Duration // without a reply it sends a request again over another connection; 0: it never does
	Total  time.Duration // after the first time a request that was sent again is to fail, 3 s later at the latest
}

// margin is how long before the client gives a connection up a request has to be answered in order
// to save that.
func (p Patience) margin() time.Duration {
	return min(max(p.Resend/8, 100*time.Millisecond), time.Second)
}

// Tick is how often Overdue is to be asked.
func (p Patience) Tick() time.Duration { return max(p.margin()/2, 10*time.Millisecond) }

// A Key is what a request asks for, by which its repetition is known.
type Key struct {
	Op     uint16
	Offset uint64
	Length uint64
}

// A Request is one that a connection has in flight.
type Request struct {
	Key
	Arrived time.Duration // on this connection
	First   time.Duration // on any; the same as Arrived unless the client has sent it again
	Times   int           // how often it came before, as far as is known
	Suspect bool          // it overlaps one that the backend never came back from
}

// Repeated reports whether the client has sent the request again.
func (r Request) Repeated() bool { return r.First < r.Arrived }

// A Judge is the memory of one export. The zero value waits for a patience.
type Judge struct {
	active atomic.Bool // an episode has begun

	mu       sync.Mutex // guards all below
	patience Patience
	lost     []lost        // unanswered when their connection died, in the order of the deaths
	until    time.Duration // during an episode: no repetition is to be expected any more
	isBlind  bool          // unknown requests may be repetitions, too
	blind    time.Duration // until then, if so
	stuck    []Key         // failed, and still in the backend
}

// lost is a request that a connection has left unanswered.
type lost struct {
	Key
	first   time.Duration
	times   int
	told    bool // it was answered, which the client may not know
	expires time.Duration
}

// SetPatience says how the clients behave from now on.
func (j *Judge) SetPatience(p Patience) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.patience = p
}

// Patience returns how the clients behave.
func (j *Judge) Patience() Patience {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.patience
}

// Active reports whether repetitions may come. An episode begins with the death of a connection. It
// costs one load.
func (j *Judge) Active() bool { return j.active.Load() }

// Lost notes that a connection has died, and what it has left unanswered. told are requests that
// were answered there in the end, by Overdue: the client may not have got the answer. blind tells
// that there may be more of which nothing is known. It begins an episode, unless clients never send
// anything again.
func (j *Judge) Lost(now time.Duration, requests, told []Request, blind bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.patience.Resend == 0 {
		return
	}
	j.forget(now)
	for _, r := range requests {
		j.lost = append(j.lost, lost{Key: r.Key, first: r.First, times: r.Times, expires: now + j.patience.Total})
	}
	for _, r := range told {
		// It comes soon, if it does, and matters as long as the backend is at work on it.
		j.lost = append(j.lost, lost{Key: r.Key, first: r.First, told: true, expires: now + j.patience.Told()})
	}
	if n := len(j.lost) - maxLost; n > 0 {
		j.lost = slices.Delete(j.lost, 0, n)
		blind = true
	}
	j.until = now + j.patience.Total
	if blind {
		// Each is repeated when its own time is up, which began before the death.
		j.isBlind, j.blind = true, now+j.patience.Resend+rounding
	}
	j.active.Store(true)
}

// forget drops what is not repeated any more. The caller holds mu.
func (j *Judge) forget(now time.Duration) {
	j.lost = slices.DeleteFunc(j.lost, func(l lost) bool { return l.expires <= now })
}

// Judge returns the request that has just arrived, with what is known of it. Each lost request is
// found once.
func (j *Judge) Judge(now time.Duration, k Key) Request {
	j.mu.Lock()
	defer j.mu.Unlock()
	r := Request{Key: k, Arrived: now, First: now, Suspect: j.suspect(k)}
	j.forget(now)
	for i, l := range j.lost {
		if l.Key == k && (!l.told || r.Suspect) {
			r.First, r.Times = l.first, l.times+1
			j.lost = slices.Delete(j.lost, i, i+1)
			return r
		}
	}
	if j.isBlind && now < j.blind {
		r.First = now - j.patience.Resend
	}
	return r
}

// Adopt is Judge for a request that arrived shortly before the death was known of the connection on
// which it came first. It reports whether the request is a repetition.
func (j *Judge) Adopt(now time.Duration, r *Request) bool {
	if r.Repeated() || now-r.Arrived > rounding {
		return false
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for i, l := range j.lost {
		if l.Key == r.Key && l.first < r.Arrived && !l.told {
			r.First, r.Times = l.first, l.times+1
			j.lost = slices.Delete(j.lost, i, i+1)
			return true
		}
	}
	return false
}

// suspect reports whether k overlaps something that is stuck. The caller holds mu.
func (j *Judge) suspect(k Key) bool {
	return slices.ContainsFunc(j.stuck, func(s Key) bool {
		return k.Offset < s.Offset+s.Length && s.Offset < k.Offset+k.Length
	})
}

// SetStuck says for which requests, that have failed, the backend is still at work. What overlaps
// them from now on is not to cost its connection, too.
func (j *Judge) SetStuck(stuck []Key) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.stuck = stuck
}

// Late reports whether a request that has just arrived is to be answered with an error at once. To
// wait for the backend once more could cost the connection: how long ago the client sent the
// request is not known, where the machine is so busy that it waited to be received.
func (j *Judge) Late(now time.Duration, r Request) bool {
	p := j.Patience()
	return p.Resend > 0 && now >= p.limit(r)
}

// Told returns how long an answer of Overdue may be without having reached the client.
func (p Patience) Told() time.Duration { return p.Resend + rounding }

// Overdue returns which of the requests that one connection has in flight are to be answered with
// an error now, by their place.
//
// A repetition has its total, and fails then. A request for what the backend never came back from
// fails shortly before it would cost the connection. Everything else is left to the client, which
// gives up the connection when the first of these has had its time; a repetition that could not be
// answered before it comes again, too late, is answered before that.
func (j *Judge) Overdue(now time.Duration, requests []Request) []int {
	p := j.Patience()
	if p.Resend == 0 {
		return nil
	}
	end := never // of the connection
	for _, r := range requests {
		if p.limit(r) > r.Arrived+p.Resend {
			end = min(end, r.Arrived+p.Resend)
		}
	}
	var due []int
	for i, r := range requests {
		limit := p.limit(r)
		again := r.Arrived + p.Resend // when the client would send it once more
		lastMoment := now >= end-p.margin() && now >= r.Arrived+p.grace(r)
		tooLateAgain := r.Repeated() && limit <= again && again > r.First+p.Total+strayed
		if now >= limit || lastMoment && tooLateAgain {
			due = append(due, i)
		}
	}
	return due
}

// grace returns the least time that r has. A flush asks for nothing that it could be known by. What
// has come a third time is known for certain.
func (p Patience) grace(r Request) time.Duration {
	most := p.Resend - p.margin()
	switch {
	case r.Length == 0:
		return most
	case r.Times >= 2:
		return 0
	default:
		return min(grace, most)
	}
}

// never is beyond all times.
const never = time.Duration(1<<63 - 1)

// limit returns when the request is to be answered with an error at the latest. Beyond Resend the
// client comes first.
func (p Patience) limit(r Request) time.Duration {
	end := r.Arrived + p.Resend
	last := end - p.margin() // in order to save the connection
	limit := never
	if r.Repeated() {
		limit = max(r.First+p.Total, r.Arrived+p.grace(r))
		if last < limit && limit <= end+rounding {
			limit = last // Otherwise it would be repeated once more for nothing, and with it what needs no repetition.
		}
	}
	switch {
	case r.Suspect && r.Times > 0:
		return r.Arrived // It has cost a connection before.
	case r.Suspect:
		return min(limit, last)
	default:
		return limit
	}
}

// Quiet reports whether the episode is over, and ends it then. repeats tells that a repetition is
// in flight.
func (j *Judge) Quiet(now time.Duration, repeats bool) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if repeats || now < j.until || len(j.stuck) > 0 {
		return false
	}
	j.lost, j.isBlind = nil, false
	j.active.Store(false)
	return true
}
