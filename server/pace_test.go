package server

import (
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// TestPace follows one operation between workers and the connection's goroutine.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		work := func(calls int, took time.Duration, want bool) {
			t.Helper()
			for range calls {
				p.worked(took, 4096)
			}
			if got := p.alone.Load(); got != want {
				t.Fatalf("without workers: %v after %d calls of %v", got, calls, took)
			}
		}
		// trip has a trial last, and rest tells for how long there is no other afterwards.
		trip := func(lasted, lost, rest time.Duration) {
			t.Helper()
			time.Sleep(lasted)
			p.takeOver(lost)
			time.Sleep(rest - time.Nanosecond)
			work(10*paceProof, 0, false)
			time.Sleep(time.Nanosecond)
			work(paceProof, 0, true)
		}
		work(10*paceProof, allowed(1, 4096)+paceTrial+1, false) // not worth a trial
		work(paceProof-1, 0, false)
		work(1, paceProof*paceTrial, true) // no faster than workers behind a lock
		trip(0, time.Millisecond, paceRest)
		trip(0, time.Millisecond, 2*paceRest)
		trip(0, time.Millisecond, 4*paceRest)
		trip(4*paceRest, 0, paceRest) // worth it
		trip(paceRest, paceRest/slowShare, paceRest)
		trip(paceRest, paceRest/slowShare+1, 2*paceRest)
		for range 20 {
			p.takeOver(time.Second)
			p.alone.Store(true)
		}
		trip(0, time.Second, maxRest)
		p.takeOver(0)
		p.takeOver(0) // another connection has found the same
		time.Sleep(maxRest)
		work(paceProof, 0, true)
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
		{"as slow as is allowed", []run{{1000, 0, paceCall}}, false},
		{"one slow", []run{{1000, 4096, quick}, {1, 4096, 10 * time.Millisecond}, {1000, 4096, quick}}, false},
		{"two slow", []run{{2, 4096, 9 * time.Millisecond}, {1000, 4096, quick}}, false},
		{"all slow", []run{{measureCalls + slowEvents, 4096, slow}}, true},
		{"just too slow", []run{{measureCalls + watchCalls, 0, paceCall + 10*time.Microsecond}}, true},
		{"often slow", []run{{measureCalls, 4096, slow}, {5, 4096, quick}, {1, 4096, slow}, {5, 4096, quick}, {1, 4096, slow},
			{5, 4096, quick}, {1, 4096, slow}}, true},
		{"rarely slow", []run{{1, 4096, slow}, {300, 4096, quick}, {1, 4096, slow}, {300, 4096, quick}, {1, 4096, slow}}, false},
		{"a stall", []run{{measureCalls - 1, 4096, quick}, {1, 4096, paceStall}}, true},
		{"a stall in a watch", []run{{measureCalls, 4096, slow}, {1, 4096, paceStall}}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var both paces
				both.read.alone.Store(true)
				both.write.alone.Store(true)
				m := meter{paces: &both}
				for _, r := range tt.runs {
					for range r.calls {
						m.begin(&both.read)
						time.Sleep(r.took)
						m.end(&both.read, r.bytes)
					}
				}
				m.settle(clock())
				if got := !both.read.alone.Load(); got != tt.want {
					t.Errorf("workers: %v, want %v", got, tt.want)
				}
				if !both.write.alone.Load() && tt.runs[len(tt.runs)-1].took < paceStall {
					t.Error("the writes were blamed, too")
				}
			})
		})
	}
}

// BenchmarkMeter times the timing of one call among many.
func BenchmarkMeter(b *testing.B) {
	var all paces
	m := meter{paces: &all}
	for b.Loop() {
		m.begin(&all.read)
		m.end(&all.read, 4096)
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
		{"stuck behind workers", 1, 1, 0, paceStall, 1, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var all paces
				all.write.alone.Store(true)
				all.write.busy.Store(tt.busy)
				var slept, preempted int64
				m := meter{paces: &all, switches: func() (int64, int64) { return slept, preempted }}
				for i := range measureCalls + watchCalls {
					m.begin(&all.write)
					if i%tt.every == 0 {
						time.Sleep(tt.took)
						slept, preempted = slept+tt.slept, preempted+tt.preempted
					}
					m.end(&all.write, 4096)
					m.settle(clock())
				}
				if got := !all.write.alone.Load(); got != tt.want {
					t.Errorf("workers: %v, want %v", got, tt.want)
				}
			})
		})
	}
}

// TestThreadSwitches holds that what the system counts can tell a call that sleeps from one that does not.
func TestThreadSwitches(t *testing.T) {
	if threadSwitches == nil {
		t.Skip("this system does not count for one thread")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, _ := threadSwitches()
	time.Sleep(time.Millisecond)
	if after, _ := threadSwitches(); after == before {
		t.Error("a sleep did not count")
	}
}
