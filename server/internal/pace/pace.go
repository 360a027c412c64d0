// Package pace decides whether workers make the calls of a backend, or the goroutines of the
// connections themselves, inline.
//
// Plain calls of a backend may take a microsecond or a second, and nothing tells which but a clock.
// Workers bear slow ones, side by side, but to hand over a request and its reply costs more than a
// fast call takes. So every operation begins on workers, where each call is timed; when these calls
// are such that a trial costs little, they move to the connections' own goroutines, where it shows
// what they take: a few slow ones, or one that stalls, move them back, and the next trial is
// further off each time.
//
// Time on workers is no proof of anything finer. Calls side by side wait for each other's locks, as
// all writes to a file do in many file systems: there they look slow because they are on workers,
// and would stay there for ever.
//
// What this costs who waits beside a slow backend is bounded. One whose calls take longer than
// maxTrial on average is never tried. One that is faster, but too slow, has about slowEvents calls
// made here in a trial, or what makes slowDebt, and after n trials in vain there is none for
// minRest * 2ⁿ, up to maxRest. One that turns slow does so for measureCalls, or a stall.
package pace

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/monotonic"
)

const (
	// A call is quick if it takes no longer than this, and quickByte more for each byte. A
	// hand-over costs several microseconds of processor time, so there is nothing to win by handing
	// over quick calls.
	quickCall = 25 * time.Microsecond
	quickByte = time.Nanosecond

	// A call that does not wait, but computes, may take computeShare times as long. Workers would
	// do it no faster, and at the same time only where processors are idle and it holds no lock: a
	// file system may take 30 µs to find the place of 4 KiB in a large page, holding one.
	computeShare = 4

	// As many calls of workers lead to a trial, if on average they took at most maxTrial longer
	// than quick ones do: the processor may have been with another process, or the calls with each
	// other, for a part of it.
	proof    = 64
	maxTrial = time.Millisecond

	// Between two trials the workers have at least minRest. It doubles, up to maxRest, with each
	// trial that was not worth it: that was shorter than the rest before, or than slowShare times
	// what was lost in the end.
	minRest   = 20 * time.Millisecond
	maxRest   = 10 * time.Second
	slowShare = 100

	// The workers take over when slowEvents calls within a watch have cost slowDebt beyond what was
	// allowed; a quick call makes up for credit, about what its hand-over would have cost. Several
	// events, because one may be the machine's doing. A stall is too long to wait for a second one.
	slowEvents = 3
	slowDebt   = 400 * time.Microsecond
	credit     = 4 * time.Microsecond
	stall      = 20 * time.Millisecond

	// Calls are timed together until these bounds, or until the replies are sent; reading a clock
	// is not free. When they were slow together, and at the beginning of a trial, the next
	// watchCalls are timed one by one.
	measureCalls = 32
	measureBytes = 128 << 10
	watchCalls   = 64
)

// A Pace decides for one operation of a backend whether workers make the calls. Safe for concurrent
// use.
type Pace struct {
	inline atomic.Bool  // without workers
	trials atomic.Int64 // how often that has begun
	busy   atomic.Int64 // calls that workers are making

	mu     sync.Mutex    // guards what follows
	calls  int           // of workers, since there was a choice last
	excess time.Duration // that they took, beyond what is allowed
	turned time.Duration // when inline changed last, by monotonic.Now()
	rest   time.Duration // of the workers, before that or since; 0: there was no trial yet
}

// A Set has those of a backend. Zeroes and trims share one.
type Set struct {
	Read, Write, Trim Pace
}

// allowed is the time that quick calls take.
func allowed(calls, bytes int) time.Duration {
	return time.Duration(calls)*quickCall + time.Duration(bytes)*quickByte
}

// Inline reports whether calls are made without workers.
func (p *Pace) Inline() bool { return p.inline.Load() }

// Enter is to be called before a worker makes a call, and Leave after it, however it has ended.
func (p *Pace) Enter() { p.busy.Add(1) }

// Leave ends what Enter has begun.
func (p *Pace) Leave() { p.busy.Add(-1) }

// Worked takes note of a call that a worker has made.
func (p *Pace) Worked(took time.Duration, bytes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls++
	p.excess += max(0, took-allowed(1, bytes))
	if p.calls < proof || p.inline.Load() {
		return
	}
	now := monotonic.Now()
	if p.excess <= proof*maxTrial && (p.rest == 0 || now-p.turned >= p.rest) {
		p.turned = now
		p.trials.Add(1)
		p.inline.Store(true)
	}
	p.calls, p.excess = 0, 0
}

// takeOver gives the calls to workers. lost is what waiting for them has cost, as far as that is
// known.
func (p *Pace) takeOver(lost time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.inline.Swap(false) {
		return
	}
	now := monotonic.Now()
	if now-p.turned >= max(p.rest, slowShare*lost) {
		p.rest = minRest
	} else {
		p.rest = min(max(2*p.rest, minRest), maxRest)
	}
	p.turned = now
	p.calls, p.excess = 0, 0
}
