package memory

import (
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimitBytes(t *testing.T) {
	l := newLimit(100)
	for _, step := range []struct {
		take int64
		want error
		used int64
	}{
		{60, nil, 60},
		{41, syscall.ENOSPC, 60},
		{40, nil, 100},
		{1, syscall.ENOSPC, 100},
		{-30, nil, 70},
		{30, nil, 100},
	} {
		var err error
		if step.take < 0 {
			l.give(-step.take)
		} else {
			err = l.take(step.take)
		}
		if !errors.Is(err, step.want) || l.inUse() != step.used {
			t.Fatalf("take %d: %v and %d in use, want %v and %d", step.take, err, l.inUse(), step.want, step.used)
		}
	}
}

// The machine is asked once in a lease, when the lease is old, and whenever it
// might have to be no.
func TestLimitAsksTheMachine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked, spare := 0, int64(1<<30)
		l := &limit{spare: func() (int64, bool) { asked++; return spare, true }}
		take := func(n int64, want error, wantAsked int) {
			t.Helper()
			if err := l.take(n); !errors.Is(err, want) || asked != wantAsked {
				t.Fatalf("take %d: %v after %d questions, want %v after %d", n, err, asked, want, wantAsked)
			}
		}
		for range 16 {
			take(1<<20, nil, 1)
		}
		take(1<<20, nil, 2) // the lease is used up
		time.Sleep(leaseTime + 1)
		take(1<<20, nil, 3) // too old
		time.Sleep(leaseTime + 1)
		spare = 16 << 20
		take(1<<19, nil, 4) // the leases get shorter
		take(1<<19, nil, 4)
		take(1<<19, nil, 5)
		take(16<<20, nil, 6) // all of it
		spare = 1<<20 - 1
		take(1<<20, syscall.ENOSPC, 7)
		take(1, nil, 8) // a no is forgotten at once: somebody may have freed memory
		spare = -5
		time.Sleep(leaseTime + 1)
		take(1, syscall.ENOSPC, 9)
		if got, want := l.inUse(), int64(18<<20+3<<19+16<<20+1); got != want {
			t.Errorf("%d in use, want %d", got, want)
		}
	})
}

func TestLimitWithoutKnowledge(t *testing.T) {
	l := &limit{spare: func() (int64, bool) { return 0, false }}
	if err := l.take(1 << 40); err != nil {
		t.Errorf("nobody knows what the machine has: %v", err)
	}
}
