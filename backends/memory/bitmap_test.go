package memory

import (
	"math/rand/v2"
	"sync"
	"testing"
)

func TestBitmap(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	const size = 300
	b := make(bitmap, (size+63)/64)
	var want [size]bool
	for range 20000 {
		lo := rng.Int64N(size)
		hi := lo + rng.Int64N(size-lo+1)
		var changed int64
		switch op := rng.IntN(3); {
		case op == 0:
			got := b.set(lo, hi)
			for i := lo; i < hi; i++ {
				if !want[i] {
					changed++
				}
				want[i] = true
			}
			if got != changed {
				t.Fatalf("set(%d, %d): %d changed, want %d", lo, hi, got, changed)
			}
		case op == 1:
			got := b.clear(lo, hi)
			for i := lo; i < hi; i++ {
				if want[i] {
					changed++
				}
				want[i] = false
			}
			if got != changed {
				t.Fatalf("clear(%d, %d): %d changed, want %d", lo, hi, got, changed)
			}
		case lo < hi:
			n := int64(1)
			for lo+n < hi && want[lo+n] == want[lo] {
				n++
			}
			if got, set := b.run(lo, hi); got != n || set != want[lo] {
				t.Fatalf("run(%d, %d): %d, %v; want %d, %v", lo, hi, got, set, n, want[lo])
			}
		}
	}
}

// Changes of different bits at the same time all count.
func TestBitmapConcurrent(t *testing.T) {
	b := make(bitmap, 4)
	var changed [4]int64
	var wg sync.WaitGroup
	for w := range int64(4) {
		wg.Go(func() {
			for range 200 {
				for i := w; i < 256; i += 4 {
					changed[w] += b.set(i, i+1)
				}
				for i := w; i < 256; i += 4 {
					changed[w] -= b.clear(i, i+1)
				}
			}
		})
	}
	wg.Wait()
	for w, c := range changed {
		if c != 0 {
			t.Errorf("worker %d is left with %d", w, c)
		}
	}
	if n, set := b.run(0, 256); n != 256 || set {
		t.Errorf("%d bits are %v", n, set)
	}
}
