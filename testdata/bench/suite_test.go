package main

import "testing"

// TestTurns holds that over the rounds every server has every place, and each other one before it,
// equally often.
func TestTurns(t *testing.T) {
	for n := 1; n <= 7; n++ {
		places, behind := make(map[[2]int]int), make(map[[2]int]int)
		for round := range 2 * n {
			last := -1
			for k := range n {
				i := turn(round, k, n)
				places[[2]int{i, k}]++
				if last >= 0 {
					behind[[2]int{last, i}]++
				}
				last = i
			}
		}
		for i := range n {
			for k := range n {
				if places[[2]int{i, k}] != 2 {
					t.Errorf("of %d, server %d has place %d in %d rounds of %d", n, i, k, places[[2]int{i, k}], 2*n)
				}
			}
		}
		for pair, times := range behind {
			if back := behind[[2]int{pair[1], pair[0]}]; back != times {
				t.Errorf("of %d, server %d comes %d times behind server %d, and %d times before it",
					n, pair[1], times, pair[0], back)
			}
		}
	}
}
