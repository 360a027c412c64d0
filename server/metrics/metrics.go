// Package metrics has what a server of block devices tells of the requests that it has answered:
// Stats, with a Histogram of latencies for each kind of request, and the Counters that they are
// counted by.
package metrics

import "time"

// OpStats counts the requests of one kind that were answered.
type OpStats struct {
	Requests uint64 // answered, with success or not
	Bytes    uint64 // covered by the requests that succeeded; 0 for flushes
	Errors   uint64 // answered with an error

	// Latency is how long the requests took, from when they were received until their replies were
	// ready to be sent: waiting for the client is no part of it. Requests that were received
	// together and answered together took equally long.
	Latency Histogram
}

// Stats counts what a connection, or all connections of an export, have served. A request is
// counted just before its reply is sent, so whoever has the reply finds it counted.
type Stats struct {
	Read, Write, Flush, Trim, WriteZeroes OpStats
	// BlockStatus is of clients that have negotiated meta contexts. What was written down without
	// it had none.
	BlockStatus OpStats `json:",omitzero"`
	// Cache is of clients that ask for what they will read. What was written down without it had
	// none.
	Cache OpStats `json:",omitzero"`

	// Unknown counts requests of a type that the server does not know; each was answered with an
	// error.
	Unknown OpStats
	// InFlight is the number of requests that workers have, and one more while the connection's own
	// goroutine answers what it has received, were it many: to count these would cost more than to
	// answer them.
	InFlight int
	// Oldest is how long ago the oldest of them was received, 0 if there is none. When it grows,
	// the backend hangs, or the client does not take its replies.
	Oldest time.Duration
}

// Add adds t to s.
func (s *Stats) Add(t *Stats) {
	s.Read.add(&t.Read)
	s.Write.add(&t.Write)
	s.Flush.add(&t.Flush)
	s.Trim.add(&t.Trim)
	s.WriteZeroes.add(&t.WriteZeroes)
	s.BlockStatus.add(&t.BlockStatus)
	s.Cache.add(&t.Cache)
	s.Unknown.add(&t.Unknown)
	s.InFlight += t.InFlight
	s.Oldest = max(s.Oldest, t.Oldest)
}

// Total returns the sum over all kinds of requests.
func (s *Stats) Total() OpStats {
	var all OpStats
	for _, kind := range []*OpStats{
		&s.Read, &s.Write, &s.Flush, &s.Trim, &s.WriteZeroes, &s.BlockStatus, &s.Cache, &s.Unknown,
	} {
		all.add(kind)
	}
	return all
}

func (s *OpStats) add(t *OpStats) {
	s.Requests += t.Requests
	s.Bytes += t.Bytes
	s.Errors += t.Errors
	s.Latency.Merge(&t.Latency)
}
