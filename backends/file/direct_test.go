package file

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// askew is memory that suits no device.
func askew(n int) []byte { return alignedMemory(n+1, 4096)[1:] }

// TestBouncesAreBounded has more requests at once than there are bounces.
func TestBouncesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDirect(512, 512)
		var running, ended atomic.Int64
		disk := make(chan struct{})
		slow := func(p []byte, off int64) (int, error) {
			if !d.suits(p) {
				t.Error("this memory does not suit")
			}
			running.Add(1)
			<-disk
			return len(p), nil
		}
		var wg sync.WaitGroup
		for i := range 2 * maxBounces {
			do := d.read
			if i%2 == 1 {
				do = d.write
			}
			wg.Go(func() {
				if n, err := do(askew(4096), 0, slow); n != 4096 || err != nil {
					t.Errorf("%d, %v", n, err)
				}
				ended.Add(1)
			})
		}
		synctest.Wait()
		if n := running.Load(); n != maxBounces {
			t.Errorf("%d requests have a bounce, want %d", n, maxBounces)
		}
		// Those whose memory suits do not wait for the others.
		all := func(p []byte, off int64) (int, error) { return len(p), nil }
		if n, err := d.read(alignedMemory(4096, 512), 0, all); n != 4096 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		close(disk)
		wg.Wait()
		if n := ended.Load(); n != 2*maxBounces {
			t.Errorf("%d requests have ended", n)
		}
	})
}

func TestMultiple(t *testing.T) {
	for _, tt := range []struct {
		unit    int64
		n, want int
	}{
		{512, 0, 512},
		{512, 1, 512},
		{512, 3, 1536},
		{512, 512, 512},
		{512, 4096, 4096},
		{4096, 512, 4096},
		{4096, 1000, 512_000},
	} {
		if got := newDirect(tt.unit, 512).multiple(tt.n); got != tt.want {
			t.Errorf("of %d and %d: %d, want %d", tt.unit, tt.n, got, tt.want)
		}
	}
}
