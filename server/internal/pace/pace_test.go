package pace

import (
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbdctl/nbdctl/server/internal/monotonic"
)

// TestPace follows one operation between workers and the connection's goroutine.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p Pace
		work := func(calls int, took time.Duration, want bool) {
			t.Helper()
			for range calls {
				p.Worked(took, 4096)
			}
			if got := p.inline.Load(); got != want {
				t.Fatalf("without workers: %v after %d calls of %v", got, calls, took)
			}
		}
		// trip has a trial last, and rest tells for how long there is no other afterwards.
		trip := func(lasted, lost, rest time.Duration) {
			t.Helper()
			time.Sleep(lasted)
			p.takeOver(lost)
			time.Sleep(rest - time.Nanosecond)
			work(10*proof, 0, false)
			time.Sleep(time.Nanosecond)
			work(proof, 0, true)
		}
		work(10*proof, allowed(1, 4096)+maxTrial+1, false) // not worth a trial
		work(proof-1, 0, false)
		work(1, proof*maxTrial, true) // no faster than workers behind a lock
		trip(0, time.Millisecond, minRest)
		trip(0, time.Millisecond, 2*minRest)
		trip(0, time.Millisecond, 4*minRest)
		trip(4*minRest, 0, minRest) // worth it
		trip(minRest, minRest/slowShare, minRest)
		trip(minRest, minRest/slowShare+1, 2*minRest)
		for range 20 {
			p.takeOver(time.Second)
			p.inline.Store(true)
		}
		trip(0, time.Second, maxRest)
		p.takeOver(0)
		p.takeOver(0) // another connection has found the same
		time.Sleep(maxRest)
		work(proof, 0, true)
	})
}

// TestMeter holds which calls make the workers take over.
func TestMeter(t *testing.T) {
	const quick, slow = time.Microsecond, 300 * time.Microsecond
	type run struct {
		calls, bytes int
		took         time.Duration // each
	}
	tests := []struct {
		name string
		runs []run
		want bool // workers
	}{
		{"quick", []run{{100000, 4096, quick}}, false},
		{"long and quick", []run{{1000, 1 << 20, time.Millisecond}}, false},
		{"as slow as is allowed", []run{{1000, 0, quickCall}}, false},
		{"one slow", []run{{1000, 4096, quick}, {1, 4096, 10 * time.Millisecond}, {1000, 4096, quick}}, false},
		{"two slow", []run{{2, 4096, 9 * time.Millisecond}, {1000, 4096, quick}}, false},
		{"all slow", []run{{measureCalls + slowEvents, 4096, slow}}, true},
		{"just too slow", []run{{measureCalls + watchCalls, 0, quickCall + 10*time.Microsecond}}, true},
		{"often slow", []run{{measureCalls, 4096, slow}, {5, 4096, quick}, {1, 4096, slow}, {5, 4096, quick},
			{1, 4096, slow},
			{5, 4096, quick}, {1, 4096, slow}}, true},
		{"rarely slow", []run{{1, 4096, slow}, {300, 4096, quick}, {1, 4096, slow}, {300, 4096, quick},
			{1, 4096, slow}}, false},
		{"a stall", []run{{measureCalls - 1, 4096, quick}, {1, 4096, stall}}, true},
		{"a stall in a watch", []run{{measureCalls, 4096, slow}, {1, 4096, stall}}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var both Set
				both.Read.inline.Store(true)
				both.Write.inline.Store(true)
				m := Meter{Set: &both}
				for _, r := range tt.runs {
					for range r.calls {
						m.Begin(&both.Read)
						time.Sleep(r.took)
						m.End(&both.Read, r.bytes)
					}
				}
				m.Settle(monotonic.Now())
				if got := !both.Read.inline.Load(); got != tt.want {
					t.Errorf("workers: %v, want %v", got, tt.want)
				}
				if !both.Write.inline.Load() && tt.runs[len(tt.runs)-1].took < stall {
					t.Error("the writes were blamed, too")
				}
			})
		})
	}
}

// BenchmarkMeter times the timing of one call among many.
func BenchmarkMeter(b *testing.B) {
	var all Set
	m := Meter{Set: &all}
	for b.Loop() {
		m.Begin(&all.Read)
		m.End(&all.Read, 4096)
	}
}

// TestMeterInnocent holds which slow calls are not the backend's doing.
func TestMeterInnocent(t *testing.T) {
	tests := []struct {
		name             string
		busy             int64 // workers
		slept, preempted int64 // in each slow call
		took             time.Duration
		every            int
		want             bool // workers
	}{
		{"it has slept", 0, 1, 0, time.Millisecond, 2, true},
		{"it has computed", 0, 0, 0, computeShare * 29 * time.Microsecond, 1, false},
		{"it has computed for long", 0, 0, 0, time.Millisecond, 2, true},
		{"preempted", 0, 0, 2, 10 * time.Millisecond, 2, false},
		{"preempted in each call", 0, 0, 1, time.Millisecond, 1, true},
		{"preempted, and has slept", 0, 1, 2, time.Millisecond, 2, true},
		{"behind workers", 1, 1, 0, time.Millisecond, 1, false},
		{"stuck behind workers", 1, 1, 0, stall, 1, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var all Set
				all.Write.inline.Store(true)
				all.Write.busy.Store(tt.busy)
				var slept, preempted int64
				m := Meter{Set: &all, Switches: func() (int64, int64) { return slept, preempted }}
				for i := range measureCalls + watchCalls {
					m.Begin(&all.Write)
					if i%tt.every == 0 {
						time.Sleep(tt.took)
						slept, preempted = slept+tt.slept, preempted+tt.preempted
					}
					m.End(&all.Write, 4096)
					m.Settle(monotonic.Now())
				}
				if got := !all.Write.inline.Load(); got != tt.want {
					t.Errorf("workers: %v, want %v", got, tt.want)
				}
			})
		})
	}
}

// TestThreadSwitches holds that what the system counts can tell a call that sleeps from one that
// does not.
func TestThreadSwitches(t *testing.T) {
	if ThreadSwitches == nil {
		t.Skip("this system does not count for one thread")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, _ := ThreadSwitches()
	time.Sleep(time.Millisecond)
	if after, _ := ThreadSwitches(); after == before {
		t.Error("a sleep did not count")
	}
}
