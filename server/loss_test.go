package server

import (
	"testing"
)

// TestLosses holds that each loss is told once to who takes them, that all remain known, and that the first is announced.
func TestLosses(t *testing.T) {
	e := new(Export)
	announced := 0
	e.OnLoss(func() { announced++ })
	if e.Loss() != nil || e.TakeLoss() != nil {
		t.Error("a loss of nothing")
	}
	requests := [3]RequestError{{Offset: 1}, {Offset: 2}, {Offset: 3}}
	e.losses.note(&requests[0])
	e.losses.note(&requests[1])
	check := func(what string, got *LossError, requests uint64, first *RequestError) {
		t.Helper()
		if got == nil || got.Requests != requests || got.First != first {
			t.Errorf("%s: %+v, want %d from offset %d", what, got, requests, first.Offset)
		}
	}
	check("taken", e.TakeLoss(), 2, &requests[0])
	if l := e.TakeLoss(); l != nil {
		t.Errorf("taken twice: %v", l)
	}
	e.losses.note(&requests[2])
	check("all", e.Loss(), 3, &requests[0])
	check("taken later", e.TakeLoss(), 1, &requests[2])
	check("all, which were taken", e.Loss(), 3, &requests[0])
	if announced != 1 {
		t.Errorf("announced %d times", announced)
	}
}
