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
	// InFlight is the number of requests that workers have read and not answered yet. A request that is executed without a worker
	// is not among them, for its answer is but an instant away.
	InFlight int
}

// Add adds t to s.
func (s *Stats) Add(t Stats) {
	s.Read.add(t.Read)
	s.Write.add(t.Write)
	s.Flush.add(t.Flush)
	s.Trim.add(t.Trim)
	s.WriteZeroes.add(t.WriteZeroes)
	s.Unknown.add(t.Unknown)
	s.InFlight += t.InFlight
}

// of returns the counts of one operation.
func (s *Stats) of(op Op) *OpStats {
	switch op {
	case OpRead:
		return &s.Read
	case OpWrite:
		return &s.Write
	case OpFlush:
		return &s.Flush
	case OpTrim:
		return &s.Trim
	case OpWriteZeroes:
		return &s.WriteZeroes
	default:
		return &s.Unknown
	}
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
	if failed {
		c.of(h.op).add(OpStats{Requests: 1, Errors: 1})
	} else {
		c.of(h.op).add(OpStats{Requests: 1, Bytes: uint64(h.length)})
	}
}

// publish adds what was counted without locking: an atomic operation for every request would wait each time for the copy of its
// data to leave the processor.
func (c *counters) publish(s *Stats) {
	for _, op := range [...]Op{OpRead, OpWrite, OpFlush, OpTrim, OpWriteZeroes} {
		if t := s.of(op); t.Requests > 0 {
			c.of(op).add(*t)
		}
	}
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

func (c *opCounters) add(t OpStats) {
	c.requests.Add(t.Requests)
	c.bytes.Add(t.Bytes)
	if t.Errors > 0 {
		c.errors.Add(t.Errors)
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
