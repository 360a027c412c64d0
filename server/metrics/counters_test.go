package metrics

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nbdctl/nbdctl/server/wire"
)

// latencies makes a Histogram of requests that took one of two times.
func latencies(quick, slow int) Histogram {
	var h histogram
	if quick > 0 {
		h.add(time.Microsecond, uint64(quick))
	}
	if slow > 0 {
		h.add(time.Second, uint64(slow))
	}
	return h.snapshot()
}

func TestCounters(t *testing.T) {
	var c Counters
	var tally Tally
	tally.Count(wire.CmdRead, 4096)
	tally.Count(wire.CmdRead, 512)
	tally.Count(wire.CmdWrite, 512)
	c.Publish(&tally, time.Microsecond)
	c.Count(wire.CmdRead, 1024, true, time.Second)
	c.Count(wire.CmdFlush, 0, false, time.Second)
	c.Count(wire.CmdTrim, 1<<40, false, time.Microsecond)
	c.Count(wire.CmdWriteZeroes, 1<<40, true, time.Microsecond)
	c.Count(wire.CmdBlockStatus, 1<<30, false, time.Microsecond)
	c.Count(wire.CmdCache, 1<<20, false, time.Microsecond)
	c.Count(99, 1, true, time.Microsecond)
	c.Retract(wire.CmdRead, 512)
	want := Stats{
		Read:        OpStats{Requests: 2, Bytes: 4096, Errors: 1, Latency: latencies(2, 1)},
		Write:       OpStats{Requests: 1, Bytes: 512, Latency: latencies(1, 0)},
		Flush:       OpStats{Requests: 1, Latency: latencies(0, 1)},
		Trim:        OpStats{Requests: 1, Bytes: 1 << 40, Latency: latencies(1, 0)},
		WriteZeroes: OpStats{Requests: 1, Errors: 1, Latency: latencies(1, 0)},
		BlockStatus: OpStats{Requests: 1, Bytes: 1 << 30, Latency: latencies(1, 0)},
		Cache:       OpStats{Requests: 1, Bytes: 1 << 20, Latency: latencies(1, 0)},
		Unknown:     OpStats{Requests: 1, Errors: 1, Latency: latencies(1, 0)},
	}
	if diff := cmp.Diff(want, c.Snapshot()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestAdd adds up all fields of what two connections have served.
func TestAdd(t *testing.T) {
	op := func(n uint64) OpStats {
		return OpStats{Requests: n, Bytes: 10 * n, Errors: n / 2, Latency: latencies(int(n), 0)}
	}
	a := Stats{
		Read: op(2), Write: op(4), Flush: op(6), Trim: op(8), WriteZeroes: op(10), BlockStatus: op(14), Cache: op(16),
		Unknown:  op(12),
		InFlight: 1, Oldest: time.Second,
	}
	sum := Stats{
		Read: op(4), Write: op(8), Flush: op(12), Trim: op(16), WriteZeroes: op(20), BlockStatus: op(28), Cache: op(32),
		Unknown:  op(24),
		InFlight: 3, Oldest: time.Second,
	}
	b := a
	b.InFlight, b.Oldest = 2, time.Millisecond
	a.Add(&b)
	if diff := cmp.Diff(sum, a); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
