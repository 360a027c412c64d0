package blockdev

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestConnectionStats holds that what each transmitter has served counts once, whether its
// successor comes before or after the backend has let go of it.
func TestConnectionStats(t *testing.T) {
	for _, behind := range []bool{false, true} {
		first, second := newSocket(), newSocket()
		first.served, second.served = 3, 5
		c := newConnection(0, first)
		check := func(what string, want uint64) {
			t.Helper()
			if n := c.stats().Read.Requests; n != want {
				t.Errorf("behind %t, %s: %d reads, want %d", behind, what, n, want)
			}
		}
		check("in the beginning", 3)
		c.died(time.Second)
		if behind {
			c.behind[first] = struct{}{}
		}
		check("dead", 3)
		c.restored(second)
		check("replaced", 8)
		if behind {
			delete(c.behind, first)
			c.fold(first)
		}
		check("in the end", 8)
		if !c.alive {
			t.Errorf("behind %t: dead in the end", behind)
		}
	}
}

// TestConnectionIdle holds that any request makes a connection one that has carried something, be
// it answered or not.
func TestConnectionIdle(t *testing.T) {
	for _, tt := range []struct {
		inFlight int
		served   uint64
		want     bool
	}{{0, 0, true}, {1, 0, false}, {0, 1, false}} {
		s := newSocket()
		s.inFlight, s.served = tt.inFlight, tt.served
		if got := s.Idle(); got != tt.want {
			t.Errorf("%d in flight, %d served: idle %t", tt.inFlight, tt.served, got)
		}
	}
}

// TestConnectionDead holds since when the kernel may have taken a connection for dead: since a
// request has had its timeout, if the loop was away then.
func TestConnectionDead(t *testing.T) {
	const timeout = 5 * time.Second
	for absence, earlier := range map[time.Duration]time.Duration{
		0:                         0,
		timeout:                   0,
		timeout + 2*time.Second:   2 * time.Second,
		timeout - time.Nanosecond: 0,
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newSocket()
			s.absence = absence
			c := newConnection(0, s)
			c.died(timeout)
			if got := time.Since(c.dead); got != earlier || c.alive {
				t.Errorf("away for %v: dead for %v, want %v; alive %t", absence, got, earlier, c.alive)
			}
		})
	}
}
