package memory

import (
	"math/bits"
	"sync/atomic"
)

// A bitmap has one bit for every chunk. Ranges of chunks are half open, and may
// be changed concurrently: each word changes in one step, a range does not.
type bitmap []atomic.Uint64

// mask returns the bits of chunks lo to hi in the word of lo.
func mask(lo, hi int64) uint64 {
	m := ^uint64(0) << (lo & 63)
	if hi>>6 == lo>>6 {
		m &^= ^uint64(0) << (hi & 63)
	}
	return m
}

// run returns whether lo is set, and how many chunks from lo on, before hi, are
// the same.
func (b bitmap) run(lo, hi int64) (n int64, set bool) {
	set = b[lo>>6].Load()>>(lo&63)&1 != 0
	c := lo
	for c < hi {
		end := b[c>>6].Load() // where the run ends, once shifted to c
		if set {
			end = ^end
		}
		if end >>= c & 63; end != 0 {
			c += int64(bits.TrailingZeros64(end))
			break
		}
		c = (c | 63) + 1
	}
	// A concurrent change of lo may have made the run empty.
	return max(min(c, hi)-lo, 1), set
}

// set sets the bits from lo to hi and returns how many were clear. It writes only
// where it has to: after a copy of some KiB, an atomic read-modify-write waits
// for the copy to leave the store buffer.
func (b bitmap) set(lo, hi int64) (changed int64) {
	for ; lo < hi; lo = (lo | 63) + 1 {
		w, m := &b[lo>>6], mask(lo, hi)
		if w.Load()&m != m {
			changed += int64(bits.OnesCount64(m &^ w.Or(m)))
		}
	}
	return changed
}

// clear clears the bits from lo to hi and returns how many were set.
func (b bitmap) clear(lo, hi int64) (changed int64) {
	for ; lo < hi; lo = (lo | 63) + 1 {
		w, m := &b[lo>>6], mask(lo, hi)
		if w.Load()&m != 0 {
			changed += int64(bits.OnesCount64(m & w.And(^m)))
		}
	}
	return changed
}
