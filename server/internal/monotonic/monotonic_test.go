package monotonic_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/monotonic"
)

// TestNow holds that the clock goes by real time, forwards only.
func TestNow(t *testing.T) {
	for range 1000 {
		outside := time.Now()
		first := monotonic.Now()
		second := monotonic.Now()
		if took := time.Since(outside); second < first || second-first > took {
			t.Fatalf("%v and then %v, within %v", first, second, took)
		}
	}
}

// TestNowInBubble holds that the clock is the one of the tests that set the time.
func TestNowInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := monotonic.Now()
		time.Sleep(time.Hour)
		if d := monotonic.Now() - begin; d != time.Hour {
			t.Errorf("an hour took %v", d)
		}
	})
}

func TestNowAllocates(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { monotonic.Now() }); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}
