package server

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestPace follows one operation between workers and the connection's goroutine.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		prove := func(calls int) {
			t.Helper()
			for range calls - 1 {
				p.worked(allowed(1, 4096), 4096)
			}
			if p.alone.Load() {
				t.Fatalf("without workers after fewer than %d quick calls", calls)
			}
			p.worked(0, 4096)
			if !p.alone.Load() {
				t.Fatalf("still on workers after %d quick calls", calls)
			}
		}
		for range 10 * paceProof { // slow once in a while
			p.worked(time.Microsecond, 4096)
			p.worked(time.Millisecond, 4096)
		}
		prove(paceProof)
		p.takeOver()
		prove(paceProof)
		time.Sleep(paceMemory)
		p.takeOver()
		prove(2 * paceProof)
		p.takeOver()
		prove(4 * paceProof)
		time.Sleep(2 * paceMemory)
		p.takeOver()
		prove(paceProof)
		for range 20 {
			p.takeOver()
			p.alone.Store(true)
		}
		p.takeOver()
		prove(maxProof)
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
						m.begin()
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
		m.begin()
		m.end(&all.read, 4096)
	}
}
