package server

import (
	"sync/atomic"
	"time"
)

// Plain calls of a backend may take a microsecond or a second, and nothing tells which but a clock. Workers bear slow ones, side
// by side, but to hand over a request and its reply costs more than a fast call takes. So every operation begins on workers,
// where each call is timed; a row of quick calls moves it to the connections' own goroutines, and there a few slow ones, or one
// that stalls, move it back. A backend that is always slow never stands in anybody's way, and one that turns slow does so for a
// few calls.
const (
	// A call is quick if it takes no longer than this, and paceByte more for each byte. A hand-over costs several microseconds of
	// processor time, so there is nothing to win by handing over quick calls.
	paceCall = 25 * time.Microsecond
	paceByte = time.Nanosecond

	// paceProof is how many quick calls in a row it takes to leave the workers. It doubles, up to maxProof, each time they have
	// to take over again within paceMemory.
	paceProof  = 64
	maxProof   = 4096
	paceMemory = time.Second

	// The workers take over when slowEvents calls within a watch have cost slowDebt beyond what was allowed; a quick call makes
	// up for paceCredit, about what its hand-over would have cost. Several events, because one may be the machine's doing:
	// another process had the processor. A stall is too long to wait for a second one.
	slowEvents = 3
	slowDebt   = 400 * time.Microsecond
	paceCredit = 4 * time.Microsecond
	paceStall  = 20 * time.Millisecond

	// Calls are timed together until these bounds, or until the replies are sent; reading a clock is not free. When they were
	// slow together, the next watchCalls are timed one by one.
	measureCalls = 32
	measureBytes = 128 << 10
	watchCalls   = 64

	// maxAlone is the longest plain call, in bytes, that the connection's goroutine makes.
	maxAlone = 1 << 20
)

// A pace decides for one operation of a backend whether workers make the calls. Safe for concurrent use.
type pace struct {
	alone atomic.Bool  // without workers
	quick atomic.Int64 // calls in a row that were, on workers
	proof atomic.Int64 // as many lead to alone; 0: paceProof
	trip  atomic.Int64 // when workers had to take over last, in Unix nanoseconds
}

// paces are those of a backend. Zeroes and trims share one.
type paces struct {
	read, write, trim pace
}

// pace returns the pace of a request that is a plain call, or nil if it always goes to a worker: what makes data durable waits for
// a disk, and the backends that answer without blocking have refused to do so when anybody else gets to ask.
func (e *Export) pace(h header) *pace {
	switch {
	case h.op == OpRead && e.dev.ReadTo == nil:
		return &e.paces.read
	case e.durably(h):
		return nil
	case h.op == OpWrite && e.dev.WriteFrom == nil:
		return &e.paces.write
	case h.op == OpTrim, h.op == OpWriteZeroes && e.dev.Zeroer != nil:
		return &e.paces.trim
	default:
		return nil
	}
}

// paceBytes is the length that a call is allowed time for. A range to trim is a number like any other.
func paceBytes(h header) int {
	if h.op == OpRead || h.op == OpWrite {
		return int(h.length)
	}
	return 0
}

// allowed is the time that quick calls take.
func allowed(calls, bytes int) time.Duration {
	return time.Duration(calls)*paceCall + time.Duration(bytes)*paceByte
}

// worked takes note of a call that a worker has made.
func (p *pace) worked(took time.Duration, bytes int) {
	if took > allowed(1, bytes) {
		p.quick.Store(0)
		return
	}
	if p.quick.Add(1) >= max(p.proof.Load(), paceProof) && !p.alone.Load() {
		p.alone.Store(true)
	}
}

// takeOver gives the calls to workers.
func (p *pace) takeOver() {
	if !p.alone.Swap(false) {
		return
	}
	p.quick.Store(0)
	now := time.Now().UnixNano()
	if time.Duration(now-p.trip.Swap(now)) > paceMemory {
		p.proof.Store(paceProof)
	} else {
		p.proof.Store(min(2*max(p.proof.Load(), paceProof), maxProof))
	}
}
