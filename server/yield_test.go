package server

import (
	"testing"
	"time"
)

// waits has y decide about n waits after replies, and returns in how many of them it gave the
// processor away. After each of those something is there, that time later, or nothing is and the
// connection waits in earnest.
func (y *yields) waits(n int, there bool, took time.Duration) (given int) {
	for range n {
		y.since = time.Second
		if y.begin() {
			given++
			if y.begin() {
				return -1 // A second time in one wait.
			}
		}
		if !there {
			y.vain()
		}
		y.end(time.Second + took)
	}
	return given
}

func TestYields(t *testing.T) {
	var y yields
	if y.begin() {
		t.Error("it yields though no replies were sent: what is with workers would wait")
	}
	if n := y.waits(1000, true, 10*time.Microsecond); n != 1000 {
		t.Errorf("%d yields in 1000 waits in which the client was quick", n)
	}
	if n := y.waits(100_000, false, time.Second); n < 50 || n > 150 {
		t.Errorf("%d yields in 100000 waits, all in vain", n)
	}
	// It comes back within the longest rest, and then stays.
	if n := y.waits(10*maxYieldRest, true, 10*time.Microsecond); n < 8*maxYieldRest {
		t.Errorf("%d yields in %d waits in which the client was quick again", n, 10*maxYieldRest)
	}
	// What takes long is tried once.
	if n := y.waits(longYieldRest, true, longYield); n != 1 {
		t.Errorf("%d yields in %d waits that took long", n, longYieldRest)
	}
}
