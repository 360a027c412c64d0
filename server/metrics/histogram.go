package metrics

import (
	"math"
	"math/bits"
	"sync/atomic"
	"time"
)

const (
	// minOctave and maxOctave are binary logarithms of nanoseconds: what is below 1.024 us and from
	// 68.7 s on is not told apart.
	minOctave = 10
	maxOctave = 36
	// octaveBuckets are the buckets of equal width for each power of two.
	octaveBuckets = 4
)

// Buckets is the number of buckets of a Histogram.
const Buckets = (maxOctave-minOctave)*octaveBuckets + 2

// A Histogram counts requests by how long they took. A bucket is at most a quarter as wide as where
// it begins, so whatever is read from one is at most that much too long. The zero value is empty.
type Histogram struct {
	// Counts has the requests of each bucket. The first one is for what took less than 1.024 us,
	// the last one for 68.7 s and more; between them there are four of equal width for each power
	// of two nanoseconds. BucketEnd has the bounds.
	Counts [Buckets]uint64
	Sum    time.Duration // of all
	Max    time.Duration // the longest
}

// bucketOf returns the bucket of a duration.
func bucketOf(d time.Duration) int {
	if d < 1<<minOctave {
		return 0
	}
	octave := bits.Len64(uint64(d)) - 1
	if octave >= maxOctave {
		return Buckets - 1
	}
	quarter := int(d>>(octave-2)) & (octaveBuckets - 1)
	return 1 + (octave-minOctave)*octaveBuckets + quarter
}

// BucketEnd returns the duration that is just too long for a bucket, from 0 to Buckets-1,
// and the first one of the next. The last bucket has no end but the longest duration there is.
func BucketEnd(bucket int) time.Duration {
	if bucket == Buckets-1 {
		return math.MaxInt64
	}
	octave, quarter := bucket/octaveBuckets, bucket%octaveBuckets
	return time.Duration(octaveBuckets+quarter) << (minOctave + octave - 2)
}

// Count returns the number of requests.
func (h *Histogram) Count() uint64 {
	var n uint64
	for _, c := range h.Counts {
		n += c
	}
	return n
}

// Mean returns the mean duration, 0 of none.
func (h *Histogram) Mean() time.Duration {
	n := h.Count()
	if n == 0 {
		return 0
	}
	return h.Sum / time.Duration(n)
}

// Quantile returns how long a part of the requests took at most, 0.5 for the median, 0.99 for all
// but the slowest hundredth. It is the end of a bucket, or Max where that is less; 0 of no
// requests.
func (h *Histogram) Quantile(part float64) time.Duration {
	n := h.Count()
	if n == 0 {
		return 0
	}
	rank := max(1, uint64(math.Ceil(part*float64(n))))
	var seen uint64
	for i, c := range h.Counts {
		if seen += c; seen >= rank {
			return min(BucketEnd(i), h.Max)
		}
	}
	return h.Max
}

// Merge adds what o has counted.
func (h *Histogram) Merge(o *Histogram) {
	for i, c := range o.Counts {
		h.Counts[i] += c
	}
	h.Sum += o.Sum
	h.Max = max(h.Max, o.Max)
}

// Since returns what h has counted after earlier, a copy of it from before. Its Max is exact only
// if it is a new one; else it is the end of its bucket.
func (h *Histogram) Since(earlier *Histogram) Histogram {
	d := Histogram{Sum: h.Sum - earlier.Sum}
	for i, c := range h.Counts {
		if d.Counts[i] = c - earlier.Counts[i]; d.Counts[i] > 0 {
			d.Max = min(BucketEnd(i), h.Max)
		}
	}
	if h.Max > earlier.Max {
		d.Max = h.Max
	}
	return d
}

// A histogram is a Histogram while it is counted. The zero value is empty. Safe for concurrent use.
type histogram struct {
	counts   [Buckets]atomic.Uint64
	sum, max atomic.Int64
}

// add counts n requests that took d each.
func (h *histogram) add(d time.Duration, n uint64) {
	h.counts[bucketOf(d)].Add(n)
	h.sum.Add(int64(d) * int64(n))
	for m := h.max.Load(); int64(d) > m && !h.max.CompareAndSwap(m, int64(d)); {
		m = h.max.Load()
	}
}

// snapshot copies the counts of now. A request that is being counted may be in one of them and not
// yet in another.
func (h *histogram) snapshot() Histogram {
	s := Histogram{Sum: time.Duration(h.sum.Load()), Max: time.Duration(h.max.Load())}
	for i := range h.counts {
		s.Counts[i] = h.counts[i].Load()
	}
	return s
}
