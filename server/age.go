package server

import "time"

// An age bounds how long ago the bytes of an inbox arrived, which is not when they were received:
// they may have waited in the socket for as long as the backend kept the loop, or as the process
// stood still. They arrived after the socket was known to be empty, and that it is when it gives
// less than it was asked for. Used by one goroutine. The zero value knows nothing.
type age struct {
	after  time.Duration // by clock(): when what is there to be consumed had not arrived yet; 0: not known
	latest time.Duration // the same of what was received last; behind it may be the rest of what came before
	empty  time.Duration // when there was nothing to receive
	now    time.Duration // before the present receive
	took   bool          // since the last one something was consumed
}

// receive is to be called before bytes are received. now is a time before, the later the better; 0:
// none is at hand. rest tells that there are bytes which are not consumed yet.
func (a *age) receive(now time.Duration, rest bool) {
	switch {
	case !rest:
		a.after = a.empty
	case a.took: // The rest is of what was received last.
		a.after = a.latest
	}
	a.latest, a.took = a.empty, false
	if now != 0 {
		a.now = now
	}
}

// drained notes that there was nothing left to receive.
func (a *age) drained() { a.empty = a.now }

// putBack notes that what was consumed is going to be received again.
func (a *age) putBack() { a.empty = a.after }

// over reports whether what is there to be consumed may have arrived longer ago than that.
func (a *age) over(limit time.Duration) bool { return a.after == 0 || clock()-a.after >= limit }
