package server

import (
	"sync/atomic"
	"time"

	"github.com/nbdctl/nbdctl/server/wire"
)

// A kind is what requests are counted by.
type kind int

const (
	kindRead kind = iota
	kindWrite
	kindFlush
	kindTrim
	kindWriteZeroes
	kindUnknown
	kinds // how many there are
)

func kindOf(op wire.Command) kind {
	switch op {
	case wire.CmdRead:
		return kindRead
	case wire.CmdWrite:
		return kindWrite
	case wire.CmdFlush:
		return kindFlush
	case wire.CmdTrim:
		return kindTrim
	case wire.CmdWriteZeroes:
		return kindWriteZeroes
	default:
		return kindUnknown
	}
}

// A tally counts requests that succeeded, where one goroutine does so for itself.
type tally [kinds]struct {
	requests, bytes uint64
}

func (t *tally) count(h wire.Request) {
	k := &t[kindOf(h.Command)]
	k.requests++
	k.bytes += h.Length
}

// counters is Stats while it is counted. Safe for concurrent use.
type counters [kinds]opCounters

type opCounters struct {
	requests, bytes, errors atomic.Uint64
	latency                 histogram
}

// count counts an answered request.
func (c *counters) count(h wire.Request, failed bool, took time.Duration) {
	k := &c[kindOf(h.Command)]
	k.requests.Add(1)
	if failed {
		k.errors.Add(1)
	} else {
		k.bytes.Add(h.Length)
	}
	k.latency.add(took, 1)
}

// publish adds what was counted without locking: an atomic operation for every request would wait
// each time for the copy of its data to leave the processor. All these requests took equally long.
func (c *counters) publish(t *tally, took time.Duration) {
	for i := range t {
		if n := t[i].requests; n > 0 {
			c[i].requests.Add(n)
			c[i].bytes.Add(t[i].bytes)
			c[i].latency.add(took, n)
		}
	}
}

// retract takes back that a request was counted as a success, but for its latency.
func (c *counters) retract(h wire.Request) {
	k := &c[kindOf(h.Command)]
	k.requests.Add(^uint64(0))
	k.bytes.Add(-h.Length)
}

// snapshot returns the counts of now. Counts of one operation may be a few requests apart.
func (c *counters) snapshot() Stats {
	return Stats{
		Read:        c[kindRead].snapshot(),
		Write:       c[kindWrite].snapshot(),
		Flush:       c[kindFlush].snapshot(),
		Trim:        c[kindTrim].snapshot(),
		WriteZeroes: c[kindWriteZeroes].snapshot(),
		Unknown:     c[kindUnknown].snapshot(),
	}
}

func (c *opCounters) snapshot() OpStats {
	return OpStats{
		Requests: c.requests.Load(),
		Bytes:    c.bytes.Load(),
		Errors:   c.errors.Load(),
		Latency:  c.latency.snapshot(),
	}
}
