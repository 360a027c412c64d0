package rangelock

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func at(first, length uint64) Range { return Range{first, first + length} }

// patient returns an owner that wants what it waits for, and gives nothing up.
func patient() *Owner { return NewOwner(func() bool { return false }, func() {}) }

// TestTable holds who waits for whom: only for older locks, of other owners, on some of the same
// bytes.
func TestTable(t *testing.T) {
	var l Table
	var gone atomic.Bool
	a, b := NewOwner(gone.Load, func() {}), patient()
	var first, second, third Lock
	if l.Add(&first, a, at(4096, 4096)) {
		t.Error("the first lock of all has to wait")
	}
	for _, tt := range []struct {
		name string
		o    *Owner
		of   Range
		free bool
	}{
		{"the same owner", a, at(4096, 4096), true},
		{"just before", b, at(0, 4096), true},
		{"just behind", b, at(8192, 4096), true},
		{"the same", b, at(4096, 4096), false},
		{"the first byte", b, at(0, 4097), false},
		{"the last byte", b, at(8191, 1), false},
		{"more on both sides", b, at(0, 1<<20), false},
	} {
		var k Lock
		if l.Free(tt.o, tt.of) != tt.free || l.TryAdd(&k, tt.o, tt.of) != tt.free || k.Held() != tt.free {
			t.Errorf("%s: want free %t", tt.name, tt.free)
		}
		l.Remove(&k)
	}
	if !l.Add(&second, b, at(0, 8192)) {
		t.Error("the second lock does not wait for the first")
	}
	if !l.Add(&third, a, at(0, 512)) {
		t.Error("the third lock does not wait for the second, which waits itself")
	}
	l.Remove(&first)
	if err := l.Wait(&second); err != nil {
		t.Error(err)
	}
	gone.Store(true)
	if err := l.Wait(&third); err != ErrAbandoned {
		t.Errorf("error %v, want ErrAbandoned", err)
	}
	l.Remove(&third)
	l.Remove(&third) // again
	l.Remove(&second)
	empty(t, &l, a, b)
}

func empty(t *testing.T, l *Table, owners ...*Owner) {
	t.Helper()
	if l.count.Load() != 0 || l.oldest != nil || l.newest != nil || l.waiting != 0 {
		t.Errorf("%d locks are left", l.count.Load())
	}
	for i, o := range owners {
		if o.held != 0 {
			t.Errorf("owner %d holds %d locks", i, o.held)
		}
	}
}

// TestExclude has many goroutines lock ranges of one array, which the race detector watches.
func TestExclude(t *testing.T) {
	var l Table
	var owner [64]*Owner
	var wg sync.WaitGroup
	for g := range 8 {
		o := patient() // one goroutine each: within an owner nothing is excluded
		wg.Go(func() {
			var k Lock
			for i := range 2000 {
				first, length := (i*7+g*13)%60, 1+(i+g)%4
				if l.Add(&k, o, at(uint64(first), uint64(length))) {
					if err := l.Wait(&k); err != nil {
						t.Error(err)
					}
				}
				for j := range length {
					owner[first+j] = o
				}
				for j := range length {
					if owner[first+j] != o {
						t.Error("somebody else was there")
					}
				}
				l.Remove(&k)
			}
		})
	}
	wg.Wait()
	empty(t, &l)
}

// TestHurry holds that who waits for a partial lock has it given up after a while, and that other
// locks are not.
func TestHurry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Table
		var partial, whole Lock
		begin := time.Now()
		giver := NewOwner(func() bool { return false }, func() {
			if took := time.Since(begin); took != Patience {
				t.Errorf("hurried after %v", took)
			}
			l.Remove(&partial)
		})
		keeper := NewOwner(func() bool { return false },
			func() { t.Error("a lock that is not partial is to be given up") })
		if !l.TryAdd(&partial, giver, at(0, 512)) || l.Add(&whole, keeper, at(512, 512)) {
			t.Fatal("locks on an empty table have to wait")
		}
		time.AfterFunc(3*Patience, func() { l.Remove(&whole) })
		waiter := patient()
		var k Lock
		if !l.Add(&k, waiter, at(0, 1024)) {
			t.Error("the lock does not wait")
		}
		if err := l.Wait(&k); err != nil || time.Since(begin) != 3*Patience {
			t.Errorf("error %v after %v", err, time.Since(begin))
		}
		l.Remove(&k)
		time.Sleep(2 * Patience)
		empty(t, &l, giver, keeper, waiter)
	})
}

// TestOrphan holds that what has failed while the backend has it holds up everybody, and is known.
func TestOrphan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Table
		a, b := patient(), patient()
		var stuck, failed, other, next Lock
		l.Add(&stuck, a, at(0, 512))
		l.Add(&other, a, at(4096, 512))
		if !l.Add(&failed, b, at(0, 1024)) {
			t.Error("the lock does not wait")
		}
		result := make(chan error)
		go func() { result <- l.Wait(&failed) }()
		synctest.Wait()
		l.Orphan(&failed)
		if err := <-result; err != ErrAbandoned {
			t.Errorf("error %v, want ErrAbandoned", err)
		}
		if diff := cmp.Diff([]Range{at(0, 512), at(0, 1024)}, l.Stuck()); diff != "" {
			t.Errorf("stuck (-want +got):\n%s", diff)
		}
		if !l.Add(&next, b, at(512, 512)) {
			t.Error("its own owner does not wait for it")
		}
		go func() { result <- l.Wait(&next) }()
		synctest.Wait()
		l.Remove(&failed)
		if err := <-result; err != nil {
			t.Error(err)
		}
		for _, k := range []*Lock{&stuck, &other, &next} {
			l.Remove(k)
		}
		if l.Stuck() != nil {
			t.Error("something is stuck in an empty table")
		}
		empty(t, &l, a, b)
	})
}

// TestSeal holds that a sealed owner gets no lock any more, and keeps those that it has.
func TestSeal(t *testing.T) {
	var l Table
	a, b := patient(), patient()
	var before, after, others Lock
	l.Add(&before, a, at(0, 512))
	l.Seal(a)
	if !l.Add(&after, a, at(4096, 512)) {
		t.Error("the lock of a sealed owner does not have to wait")
	}
	if err := l.Wait(&after); err != ErrAbandoned {
		t.Errorf("error %v, want ErrAbandoned", err)
	}
	l.Remove(&after)
	if !l.Add(&others, b, at(0, 512)) {
		t.Error("nobody waits for what a sealed owner had before")
	}
	l.Remove(&others)
	l.Remove(&before)
	empty(t, &l, a, b)
}
