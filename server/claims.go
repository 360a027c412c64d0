package server

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/resend"
	"github.com/nbdctl/nbdctl/server/wire"
)

// A client with several connections sends a request again over another one when the first does not answer in time, as the Linux
// client does (nbd_xmit_timeout), and the backend may still be at work on the old one. Were the two executed side by side, the new
// one could be answered, newer data be written, and the old one end last, on top of them. So what changes bytes waits for
// what was there before it for the same bytes, on another connection. Reads do not, nor does anything within a connection: a client
// that has two writes of the same bytes in flight there does not care which one wins. One that was told of a failure does: what has
// failed so holds up everybody.

// errAbandoned is the outcome of a request whose client has gone before its turn came. Nobody gets to see it but the log.
var errAbandoned = errors.New("not executed: the client hung up, or was told that it has failed, before its turn came")

// A claim is the range that a request changes, from before the backend sees it until it has let go of it. The zero value is none.
type claim struct {
	conn       *Conn // nil: not in the list
	first, end uint64
	orphan     bool // its client was told that the request has failed
	stuck      bool // another one has failed because of it

	older, newer *claim
}

// claims are those of an export, in the order in which they came. Each waits only for older ones, so there is always one that
// does not. The list is bounded by what connections may have in flight. Safe for concurrent use.
type claims struct {
	count atomic.Int32 // of those in the list; changes under mu

	mu             sync.Mutex // guards all below, the claims in the list, and the claimed of each connection
	gone           sync.Cond  // a claim, or a client
	oldest, newest *claim
	waiting        int // for their turn
}

// add puts k in the list, for the range of h, and reports whether it has to wait. It does not block. On a sealed connection there is
// nothing to wait for, which wait says.
func (l *claims) add(k *claim, c *Conn, h *wire.Request) (wait bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	*k = claim{conn: c, first: h.Offset, end: h.End()}
	k.older = l.newest
	if k.older == nil {
		l.oldest = k
	} else {
		k.older.newer = k
	}
	l.newest = k
	c.claimed++
	l.count.Add(1)
	return c.sealed || l.contested(k)
}

// tryAdd is add if that would not have to wait, and nothing else.
func (l *claims) tryAdd(k *claim, c *Conn, h *wire.Request) bool {
	if l.add(k, c, h) {
		l.remove(k)
		return false
	}
	return true
}

// free reports whether nobody but c has a claim to the range of h. It is for who will be done in no time.
func (l *claims) free(c *Conn, h *wire.Request) bool {
	if l.count.Load() == 0 {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.contested(&claim{conn: c, first: h.Offset, end: h.End(), older: l.newest})
}

// contested reports whether a claim that is older than k, of another connection, overlaps it. The caller holds mu.
func (l *claims) contested(k *claim) bool {
	if int(l.count.Load()) == k.conn.claimed {
		return false
	}
	for o := k.older; o != nil; o = o.older {
		if o.overlaps(k) {
			return true
		}
	}
	return false
}

// overlaps reports whether o is of another connection than k, or of nobody any more, and has bytes in common with it.
func (o *claim) overlaps(k *claim) bool {
	return (o.conn != k.conn || o.orphan) && o.first < k.end && k.first < o.end
}

// payloadPatience is how long a write may wait for the rest of its payload while another request waits for it.
const payloadPatience = time.Second

// wait returns when it is the turn of k, or errAbandoned when its client has gone before.
func (l *claims) wait(k *claim) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.conn.sealed || k.orphan {
		return errAbandoned
	}
	if !l.contested(k) {
		return nil
	}
	return l.queue(k)
}

// queue is wait for a claim whose turn has not come. The caller holds mu.
func (l *claims) queue(k *claim) error {
	done := false // guarded by mu; k may be another claim then
	timer := time.AfterFunc(payloadPatience, func() { l.hurry(k, &done) })
	defer func() {
		done = true
		timer.Stop()
	}()
	for l.contested(k) {
		if k.conn.abandoned() || k.orphan {
			return errAbandoned
		}
		l.waiting++
		l.gone.Wait()
		l.waiting--
	}
	return nil
}

// hurry has the connections that k waits for give up claims that they hold for a client who keeps the rest of a payload to itself. No
// peer can make others wait for ever. done tells that k waits no more.
func (l *claims) hurry(k *claim, done *bool) {
	var conns []*Conn
	l.mu.Lock()
	if !*done {
		for o := k.older; o != nil; o = o.older {
			// The others are of requests that are complete.
			if o == &o.conn.claim && o.overlaps(k) {
				conns = append(conns, o.conn)
			}
		}
	}
	l.mu.Unlock()
	for _, c := range conns {
		c.disturb()
	}
}

// remove takes k out of the list, if it is there.
func (l *claims) remove(k *claim) {
	if k.conn != nil { // Most writes have none: this is to be inlined.
		l.unlink(k)
	}
}

func (l *claims) unlink(k *claim) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.older == nil {
		l.oldest = k.newer
	} else {
		k.older.newer = k.newer
	}
	if k.newer == nil {
		l.newest = k.older
	} else {
		k.newer.older = k.older
	}
	if !k.orphan {
		k.conn.claimed--
	}
	l.count.Add(-1)
	k.conn = nil
	if l.waiting > 0 {
		l.gone.Broadcast()
	}
}

// orphan has k, if it is in the list, hold up whoever comes after it, its own connection included. It is for a request whose client
// was told that it has failed: newer data must not be overwritten by it.
func (l *claims) orphan(k *claim) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.conn == nil || k.orphan {
		return
	}
	for o := k.older; o != nil; o = o.older {
		if o.overlaps(k) {
			o.stuck = true
		}
	}
	k.orphan = true
	k.conn.claimed--
	l.gone.Broadcast()
}

// stuck appends to all the ranges because of which requests have failed.
func (l *claims) stuck(all []resend.Key) []resend.Key {
	l.mu.Lock()
	defer l.mu.Unlock()
	for k := l.oldest; k != nil; k = k.newer {
		if k.stuck || k.orphan {
			all = append(all, resend.Key{Offset: k.first, Length: k.end - k.first})
		}
	}
	return all
}

// seal keeps requests of c from changing anything that have no claim yet.
func (l *claims) seal(c *Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.sealed = true
	c.left.Store(true)
	l.gone.Broadcast()
}

// wake has those who wait look again.
func (l *claims) wake() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone.Broadcast()
}
