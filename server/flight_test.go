package server

import "testing"

// TestFlightUnsent holds which requests count as held up by their client: those that have memory, and are done since that turn at least.
func TestFlightUnsent(t *testing.T) {
	const turn = 5
	for _, tt := range []struct {
		name  string
		cost  int64
		bound int64 // 0: the backend is at work on it
		want  bool
	}{
		{"done before", 4096, turn - 1, true},
		{"done in that turn", 4096, turn, true},
		{"done after it", 4096, turn + 1, false},
		{"not done", 4096, 0, false},
		{"done without memory", 0, turn - 1, false},
	} {
		var f flight
		other, r := &request{cost: 4096}, &request{cost: tt.cost}
		f.add(other)
		f.add(r)
		if tt.bound != 0 {
			f.bind(r, tt.bound)
		}
		if got := f.unsent(turn); got != tt.want {
			t.Errorf("%s: %t, want %t", tt.name, got, tt.want)
		}
		f.remove(r)
		if f.unsent(turn) {
			t.Errorf("%s: counts when it is gone", tt.name)
		}
	}
}

// TestHoards holds from which turn on a client that keeps the rest of a payload to itself is disconnected.
func TestHoards(t *testing.T) {
	var c Conn
	const since = 3
	if c.hoards(since + hoardTurns) {
		t.Error("a client that sends nothing counts")
	}
	c.receiving.Store(since)
	if c.hoards(since+hoardTurns-1) || !c.hoards(since+hoardTurns) {
		t.Errorf("it does not count after %d turns", hoardTurns)
	}
}
