package metrics

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestBuckets holds that the buckets cover all durations without a gap, and are as narrow as
// promised.
func TestBuckets(t *testing.T) {
	begin := time.Duration(0)
	for i := range Buckets {
		end := BucketEnd(i)
		middle := begin + (end-begin)/2
		if got := [...]int{bucketOf(begin), bucketOf(middle), bucketOf(end - 1)}; got != [...]int{i, i, i} {
			t.Errorf("bucket %d, from %v to %v: beginning, middle and end are in %v", i, begin, end, got)
		}
		if i > 0 && i < Buckets-1 && end-begin > begin/4 {
			t.Errorf("bucket %d, from %v to %v, is too wide", i, begin, end)
		}
		begin = end
	}
	for d, want := range map[time.Duration]int{
		-1: 0, 0: 0, 1023: 0, 1024: 1, 1279: 1, 1280: 2, 2048: 5, 1<<36 - 1: 104, 1 << 36: 105, time.Hour: 105,
		math.MaxInt64: 105,
	} {
		if got := bucketOf(d); got != want {
			t.Errorf("%v is in bucket %d, want %d", d, got, want)
		}
	}
}

// collect returns a histogram of durations.
func collect(all ...time.Duration) Histogram {
	var h histogram
	for _, d := range all {
		h.add(d, 1)
	}
	return h.snapshot()
}

func TestHistogram(t *testing.T) {
	const us, ms = time.Microsecond, time.Millisecond
	hundred := make([]time.Duration, 0, 100)
	for i := range 99 {
		hundred = append(hundred, time.Duration(100+i)*us)
	}
	hundred = append(hundred, 80*time.Second)
	tests := []struct {
		name              string
		h                 Histogram
		count             uint64
		mean              time.Duration
		median, p99, most time.Duration
	}{
		{"none", Histogram{}, 0, 0, 0, 0, 0},
		{"one", collect(10 * us), 1, 10 * us, 10 * us, 10 * us, 10 * us},
		{"fast", collect(100, 200, 300), 3, 200, 300, 300, 300},
		{"two far apart", collect(10*us, 10*ms), 2, 5005 * us, 10240, 10 * ms, 10 * ms},
		// 149 us is in the bucket from 131.072 to 163.84 us, 198 us in the one up to 229.376 us.
		{"one slow in a hundred", collect(hundred...), 100, 800147510, 163840, 229376, 80 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := tt.h
			if h.Count() != tt.count || h.Mean() != tt.mean {
				t.Errorf("%d requests of %v, want %d of %v", h.Count(), h.Mean(), tt.count, tt.mean)
			}
			got := fmt.Sprint(h.Quantile(0.5), h.Quantile(0.99), h.Quantile(1), h.Max)
			if want := fmt.Sprint(tt.median, tt.p99, tt.most, tt.most); got != want {
				t.Errorf("median, 99th percentile, all and the longest: %s, want %s", got, want)
			}
			if h.Quantile(0) > h.Quantile(0.5) || h.Quantile(2) != h.Max {
				t.Errorf("parts outside of 0 to 1: %v, %v", h.Quantile(0), h.Quantile(2))
			}
		})
	}
}

// TestMergeAndSince splits a random history: its parts merge into the whole, and what came after a
// part is the other one.
func TestMergeAndSince(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 100 {
		var first, second []time.Duration
		for range rng.IntN(50) {
			first = append(first, time.Duration(rng.Int64N(1<<(1+rng.IntN(40)))))
		}
		for range rng.IntN(50) {
			second = append(second, time.Duration(rng.Int64N(1<<(1+rng.IntN(40)))))
		}
		a, b := collect(first...), collect(second...)
		whole := collect(append(first, second...)...)
		sum := a
		sum.Merge(&b)
		if diff := cmp.Diff(whole, sum); diff != "" {
			t.Fatalf("merged (-want +got):\n%s", diff)
		}
		since := whole.Since(&a)
		if since.Max < b.Max || bucketOf(since.Max-1) > bucketOf(b.Max) || since.Max > whole.Max {
			t.Fatalf("the longest since is %v, want about %v", since.Max, b.Max)
		}
		since.Max = b.Max
		if diff := cmp.Diff(b, since); diff != "" {
			t.Fatalf("since (-want +got):\n%s", diff)
		}
	}
}

func BenchmarkHistogram(b *testing.B) {
	var h histogram
	for d := time.Duration(0); b.Loop(); d += 977 {
		h.add(d&(1<<20-1), 32)
	}
}
