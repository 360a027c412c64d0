package blocksize

import (
	"context"
	"testing"
)

// TestDropInTurn has the turn of a claim come at the moment at which it is given up: who gets the
// claim next waits for a turn of its own.
func TestDropInTurn(t *testing.T) {
	var s claims
	first, err := s.take(t.Context(), 0, 1, false)
	if err != nil {
		t.Fatal(err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if _, err := s.take(ended, 0, 1, false); err != context.Canceled {
		t.Fatal(err)
	}
	second := &claim{lo: 0, hi: 1, waits: true, turn: make(chan struct{}, 1)}
	s.all, s.waiting = append(s.all, second), s.waiting+1
	s.drop(first)
	if second.waits || len(second.turn) != 1 {
		t.Fatal("it is not its turn")
	}
	s.drop(second)
	if len(second.turn) != 0 || len(s.all) != 0 || s.waiting != 0 {
		t.Errorf("%d turns are left, %d claims, of which %d wait", len(second.turn), len(s.all), s.waiting)
	}
}
