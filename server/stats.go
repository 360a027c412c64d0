package server

import "sync/atomic"

// OpStats counts the requests of one kind that were answered.
type OpStats struct {
	Requests uint64 // answered, with success or not
	Bytes    uint64 // covered by the requests that succeeded; 0 for flushes
	Errors   uint64 // answered with an error
}

// Stats counts what a connection, or all connections of an export, have served. A request is counted just before its reply is
// sent, so whoever has the reply finds it counted.
type Stats struct {
	Read, Write, Flush, Trim, WriteZeroes OpStats

	// Unknown counts requests of a type that the server does not know; each was answered with an error.
	Unknown OpStats
	// InFlight is the number of requests that were read and are not answered yet.
	InFlight int
}

// add adds t to s.
func (s *Stats) add(t Stats) {
	s.Read.add(t.Read)
	s.Write.add(t.Write)
	s.Flush.add(t.Flush)
	s.Trim.add(t.Trim)
	s.WriteZeroes.add(t.WriteZeroes)
	s.Unknown.add(t.Unknown)
	s.InFlight += t.InFlight
}

func (s *OpStats) add(t OpStats) {
	s.Requests += t.Requests
	s.Bytes += t.Bytes
	s.Errors += t.Errors
}

// counters is Stats while it is counted. Safe for concurrent use.
type counters struct {
	read, write, flush, trim, zero, unknown opCounters
}

type opCounters struct {
	requests, bytes, errors atomic.Uint64
}

// count counts an answered request.
func (c *counters) count(h header, failed bool) {
	op := c.of(h.op)
	op.requests.Add(1)
	if failed {
		op.errors.Add(1)
		return
	}
	op.bytes.Add(uint64(h.length))
}

func (c *counters) of(op Op) *opCounters {
	switch op {
	case OpRead:
		return &c.read
	case OpWrite:
		return &c.write
	case OpFlush:
		return &c.flush
	case OpTrim:
		return &c.trim
	case OpWriteZeroes:
		return &c.zero
	default:
		return &c.unknown
	}
}

// snapshot returns the counts of now. Counts of one operation may be a request apart.
func (c *counters) snapshot() Stats {
	return Stats{
		Read:        c.read.snapshot(),
		Write:       c.write.snapshot(),
		Flush:       c.flush.snapshot(),
		Trim:        c.trim.snapshot(),
		WriteZeroes: c.zero.snapshot(),
		Unknown:     c.unknown.snapshot(),
	}
}

func (c *opCounters) snapshot() OpStats {
	return OpStats{Requests: c.requests.Load(), Bytes: c.bytes.Load(), Errors: c.errors.Load()}
}
