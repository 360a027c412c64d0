package metrics

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
	kindBlockStatus
	kindCache
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
	case wire.CmdBlockStatus:
		return kindBlockStatus
	case wire.CmdCache:
		return kindCache
	default:
		return kindUnknown
	}
}

// A Tally counts requests that succeeded, where one goroutine does so for itself. The zero value is
// empty.
type Tally [kinds]struct {
	requests, bytes uint64
}

// Count counts a request that covers that many bytes.
func (t *Tally) Count(op wire.Command, length uint64) {
	k := &t[kindOf(op)]
	k.requests++
	k.bytes += length
}

// Counters are Stats while they are counted, but for what is in flight. The zero value is empty.
// Safe for concurrent use.
type Counters [kinds]opCounters

type opCounters struct {
	requests, bytes, errors atomic.Uint64
	latency                 histogram
}

// Count counts an answered request that covers that many bytes.
func (c *Counters) Count(op wire.Command, length uint64, failed bool, took time.Duration) {
	k := &c[kindOf(op)]
	k.requests.Add(1)
	if failed {
		k.errors.Add(1)
	} else {
		k.bytes.Add(length)
	}
	k.latency.add(took, 1)
}

// Publish adds a Tally of requests, which all took equally long. That costs a few atomic
// operations: one for every request would wait each time for the copy of its data to leave the
// processor.
func (c *Counters) Publish(t *Tally, took time.Duration) {
	for i := range t {
		if n := t[i].requests; n > 0 {
			c[i].requests.Add(n)
			c[i].bytes.Add(t[i].bytes)
			c[i].latency.add(took, n)
		}
	}
}

// Retract takes back that a request was counted as a success, but for its latency.
func (c *Counters) Retract(op wire.Command, length uint64) {
	k := &c[kindOf(op)]
	k.requests.Add(^uint64(0))
	k.bytes.Add(-length)
}

// Snapshot returns the counts of now. Counts of one operation may be a few requests apart.
func (c *Counters) Snapshot() Stats {
	return Stats{
		Read:        c[kindRead].snapshot(),
		Write:       c[kindWrite].snapshot(),
		Flush:       c[kindFlush].snapshot(),
		Trim:        c[kindTrim].snapshot(),
		WriteZeroes: c[kindWriteZeroes].snapshot(),
		BlockStatus: c[kindBlockStatus].snapshot(),
		Cache:       c[kindCache].snapshot(),
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
