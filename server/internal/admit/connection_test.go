package admit

import (
	"testing"
	"testing/synctest"
)

func TestConnection(t *testing.T) {
	tests := []struct {
		name  string
		costs []int64
		in    int // how many get in at first
	}{
		{"by number", []int64{0, 0, 0, 0}, 3},
		{"by bytes", []int64{60, 40, 1}, 2},
		{"larger than the limit, alone", []int64{500, 0}, 1},
		{"larger than the limit, waits", []int64{1, 500}, 1},
		{"order is kept", []int64{100, 1, 0}, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := NewConnection(3, 100)
				entered := 0
				go func() {
					for _, cost := range tt.costs {
						c.Enter(cost)
						entered++
					}
				}()
				synctest.Wait()
				if n, _ := c.InFlight(); entered != tt.in || n != tt.in {
					t.Fatalf("%d of %v entered, %d in flight, want %d", entered, tt.costs, n, tt.in)
				}
				if waiting := c.IfWaiting(func() {}); !waiting {
					t.Error("nobody waits")
				}
				for _, cost := range tt.costs {
					c.Leave(cost)
					synctest.Wait()
				}
				c.Drained(nil)
				if n, bytes := c.InFlight(); entered != len(tt.costs) || n != 0 || bytes != 0 {
					t.Errorf("in the end %d entered, %d requests and %d bytes are inside", entered, n, bytes)
				}
			})
		})
	}
}
