package server

import (
	"testing"
	"time"
)

// TestAge follows what is known of when bytes arrived.
func TestAge(t *testing.T) {
	var a age
	steps := []struct {
		what    string
		now     time.Duration // before it is received; 0: not known
		rest    bool
		drained bool // then
		after   time.Duration
		took    bool // thereafter
	}{
		{"the first", 0, false, false, 0, true},
		{"more than was asked for", 10, false, false, 0, true},
		{"all that there is", 20, false, true, 0, true},
		{"what came since", 30, false, true, 20, true},
		{"what came since then", 40, false, false, 30, true},
		{"what was left there", 50, false, true, 30, true},
		{"the beginning of a request", 60, false, true, 50, false},
		{"a second piece of it", 70, true, true, 50, false},
		{"the end of it, and the beginning of another", 80, true, true, 50, true},
		{"the end of that", 90, true, true, 70, true},
		{"when no time is at hand", 0, false, true, 90, true},
		{"after an earlier one", 120, false, true, 90, true},
		{"after that", 130, false, true, 120, true},
	}
	for _, s := range steps {
		a.receive(s.now, s.rest)
		if s.drained {
			a.drained()
		}
		if a.after != s.after {
			t.Errorf("%s: came after %d, want %d", s.what, a.after, s.after)
		}
		a.took = a.took || s.took
	}
	a.putBack()
	if a.receive(200, false); a.after != 120 {
		t.Errorf("what was put back came after %d, want 120 as before", a.after)
	}
}
