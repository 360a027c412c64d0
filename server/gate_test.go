package server

import (
	"testing"
	"testing/synctest"
)

func TestGate(t *testing.T) {
	tests := []struct {
		name  string
		costs []int64
		in    int // how many get in at first
	}{
		{"by number", []int64{0, 0, 0, 0}, 3},
		{"by bytes", []int64{60, 40, 1}, 2},
		{"larger than the bound, alone", []int64{500, 0}, 1},
		{"larger than the bound, waits", []int64{1, 500}, 1},
		{"order is kept", []int64{100, 1, 0}, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGate(3, 100)
				entered := 0
				go func() {
					for _, c := range tt.costs {
						g.enter(c)
						entered++
					}
				}()
				synctest.Wait()
				if entered != tt.in || g.requests != tt.in {
					t.Fatalf("%d of %v entered, %d in flight, want %d", entered, tt.costs, g.requests, tt.in)
				}
				for _, c := range tt.costs {
					g.leave(c)
					synctest.Wait()
				}
				g.drained(nil)
				if entered != len(tt.costs) || g.requests != 0 || g.bytes != 0 {
					t.Errorf("in the end %d entered, %d requests and %d bytes are inside", entered, g.requests, g.bytes)
				}
			})
		})
	}
}
