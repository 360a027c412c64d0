package server_test

import (
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server"
)

// TestLatency holds what is counted as the duration of a request, whoever executes it.
func TestLatency(t *testing.T) {
	const pause = 50 * time.Millisecond
	tests := map[string]struct {
		q  call
		of func(s *server.Stats) *server.OpStats
	}{
		"read":      {call{op: cmdRead, length: 512}, func(s *server.Stats) *server.OpStats { return &s.Read }},
		"long read": {call{op: cmdRead, length: 1 << 20}, func(s *server.Stats) *server.OpStats { return &s.Read }},
		"write": {call{op: cmdWrite, data: make([]byte, 512)},
			func(s *server.Stats) *server.OpStats { return &s.Write }},
		"large write": {call{op: cmdWrite, data: make([]byte, 1<<20)},
			func(s *server.Stats) *server.OpStats { return &s.Write }},
		"flush": {call{op: cmdFlush}, func(s *server.Stats) *server.OpStats { return &s.Flush }},
		"trim":  {call{op: cmdTrim, length: 512}, func(s *server.Stats) *server.OpStats { return &s.Trim }},
		"write zeroes": {call{op: cmdZero, length: 512},
			func(s *server.Stats) *server.OpStats { return &s.WriteZeroes }},
	}
	for name, tt := range tests {
		for _, inline := range []bool{false, true} {
			t.Run(name+map[bool]string{true: " without workers"}[inline], func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					d := newDisk(1 << 20)
					s := connect(t, export(t, d, server.Options{}))
					if inline {
						warm(s.client)
					}
					before := s.conn.Stats()
					pausing(d, pause, nil)
					s.expect(0, tt.q)
					after := s.conn.Stats()
					l := tt.of(&after).Latency.Since(&tt.of(&before).Latency)
					if l.Count() != 1 || l.Sum != pause || l.Max != pause {
						t.Errorf("%d requests that took %v, the longest %v; want one of %v",
							l.Count(), l.Sum, l.Max, pause)
					}
					s.disconnect()
				})
			})
		}
	}
}

// TestLatencyIsNotTheClients has a client that takes its time to send a request and to take the
// reply.
func TestLatencyIsNotTheClients(t *testing.T) {
	for name, q := range map[string]call{
		"read":        {op: cmdRead, length: 1 << 20},
		"write":       {op: cmdWrite, data: make([]byte, 512)},
		"large write": {op: cmdWrite, data: make([]byte, 1<<20)},
	} {
		for _, direct := range []bool{false, true} {
			t.Run(name+map[bool]string{true: " direct"}[direct], func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := export(t, newDisk(1<<20), server.Options{})
					if direct {
						e = export(t, directDisk{newDisk(1 << 20)}, server.Options{})
					}
					ours, theirs := net.Pipe()
					conn := e.NewConn(theirs, nil)
					result := make(chan error, 1)
					go func() { result <- conn.Transmit() }()
					stream := q.encode(1)
					for _, cut := range []int{14, 28 + 100, 28 + 300, len(stream)} {
						if len(stream) == 0 {
							break
						}
						n := min(len(stream), cut)
						ours.Write(stream[:n])
						stream = stream[n:]
						synctest.Wait()
						if st := conn.Stats(); st.Oldest != 0 && len(stream) > 0 {
							t.Errorf("a request of which %d bytes have not come is in flight", len(stream))
						}
						time.Sleep(time.Second)
					}
					if st := conn.Stats(); st.InFlight != 1 || st.Oldest != time.Second {
						t.Errorf("%d requests whose reply the client does not take, for %v", st.InFlight, st.Oldest)
					}
					if _, err := readReply(ours, func(uint64) int { return int(q.length) }); err != nil {
						t.Error(err)
					}
					go io.Copy(io.Discard, ours) // A pipe has even pieces without a byte taken.
					synctest.Wait()
					st := conn.Stats()
					if sum := st.Read.Latency.Sum + st.Write.Latency.Sum; sum != 0 || total(st) != 1 {
						t.Errorf("%d requests took %v", total(st), sum)
					}
					ours.Close()
					checkError(t, <-result, nil)
				})
			})
		}
	}
}

// TestOldest holds that a request that is stuck shows while it is, whoever executes it.
func TestOldest(t *testing.T) {
	for name, inline := range map[string]bool{"worker": false, "no worker": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(1 << 20)
				e := export(t, d, server.Options{})
				s, other := connect(t, e), connect(t, e)
				if inline {
					warm(s.client)
				}
				expect := func(when string, inFlight int, oldest time.Duration) {
					t.Helper()
					synctest.Wait()
					for _, st := range []server.Stats{s.conn.Stats(), e.Stats()} {
						if st.InFlight != inFlight || st.Oldest != oldest {
							t.Errorf("%s: %d in flight, the oldest for %v; want %d, %v",
								when, st.InFlight, st.Oldest, inFlight, oldest)
						}
					}
				}
				expect("idle", 0, 0)
				pausing(d, time.Hour, nil)
				first := s.start(call{op: cmdRead, length: 512})
				time.Sleep(time.Minute)
				expect("stuck", 1, time.Minute)
				if !inline {
					second := s.start(call{op: cmdWrite, data: make([]byte, 512)})
					s.expect(0, call{op: cmdRead, offset: 4096, length: 512})
					time.Sleep(time.Minute)
					expect("two stuck", 2, 2*time.Minute)
					<-first
					expect("the first one is through", 1, 59*time.Minute)
					<-second
				} else {
					<-first
				}
				expect("done", 0, 0)
				s.disconnect()
				other.disconnect()
				expect("disconnected", 0, 0)
			})
		})
	}
}
