package main

import (
	"math/bits"
	"time"
)

// steps is how many steps a histogram has for each power of two.
const steps = 32

// A histogram has latencies, at most 3 % off.
type histogram [60 * steps]int

func (h *histogram) count(d time.Duration) {
	v := uint64(max(d, 0))
	if v < 2*steps {
		h[v]++
		return
	}
	exponent := bits.Len64(v) - 6 // v >> exponent is steps to 2*steps-1.
	h[exponent*steps+int(v>>exponent)]++
}

func (h *histogram) add(other *histogram) {
	for i, n := range other {
		h[i] += n
	}
}

// percentile is the latency below which p percent are.
func (h *histogram) percentile(p int) time.Duration {
	total, seen := 0, 0
	for _, n := range h {
		total += n
	}
	for i, n := range h {
		if seen += n; seen > 0 && seen*100 >= total*p {
			if i < 2*steps {
				return time.Duration(i)
			}
			return time.Duration(i%steps+steps) << (i/steps - 1)
		}
	}
	return 0
}
