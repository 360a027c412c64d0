package server

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestLosses holds that a loss is the same however often it is asked for, that the next one has the
// next number, and that each is announced.
func TestLosses(t *testing.T) {
	e := new(Export)
	var announced []uint64
	e.OnLoss(func(r *RequestError) { announced = append(announced, r.Offset) })
	if l := e.Loss(); l != nil {
		t.Errorf("a loss of nothing: %v", l)
	}
	requests := [3]RequestError{{Offset: 1}, {Offset: 2}, {Offset: 3}}
	for i := range requests {
		e.losses.note(&requests[i])
		for range 2 {
			if l := e.Loss(); l == nil || l.Requests != uint64(i+1) || l.First != &requests[0] {
				t.Errorf("%+v, want number %d, and the first request", l, i+1)
			}
		}
	}
	if diff := cmp.Diff([]uint64{1, 2, 3}, announced); diff != "" {
		t.Error("announced (-want +got):\n" + diff)
	}
}
